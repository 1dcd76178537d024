"""Checkpoints in a second place: whole ones only, by the same rules, and back again."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cloze import storage
from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import Retention, Writer, WriterOptions
from pretrain.checkpoint.format import MANIFEST
from pretrain.checkpoint.mirror import Mirror
from tests.s3_front import Front, front_of, write_key
from tests.unit.test_checkpoint import make_snapshot, same


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield str(tmp_path / "remote" / "r")
    elif request.param == "memory":
        yield "memory://bucket/runs/r"
        fsspec.filesystem("memory").store.clear()
    else:
        request.getfixturevalue("store")
        yield f"s3://bucket/runs/{tmp_path.name}"


def mirror(url: str, keep_last: int = 2, keep_every: int = 0) -> Mirror:
    return Mirror(url, Retention(keep_last=keep_last, keep_every=keep_every))


def names(url: str) -> list[str]:
    files, root = fsspec.url_to_fs(url)
    return sorted(path.rsplit("/", 1)[-1] for path in files.ls(root, detail=False))


def told(text: str) -> None:
    raise AssertionError(text)


def test_there_and_back(url: str, tmp_path: Path) -> None:
    assert mirror(url).pull(tmp_path / "new", told) is None
    for step in (3, 5):
        mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(step)))
    found = mirror(url).pull(tmp_path / "new", told)
    assert found == tmp_path / "new" / "step-00000005"
    assert checkpoint.verify(found) == []
    assert same(checkpoint.load(found), make_snapshot(5))


def test_the_manifest_is_the_last_to_arrive(url: str, tmp_path: Path) -> None:
    """Whoever is killed in between leaves nothing that looks whole."""
    seen: list[list[str]] = []
    path = checkpoint.write(tmp_path, make_snapshot(3))
    mirror(url).push(path, lambda: seen.append(names(f"{url}/{path.name}")))
    assert len(seen) == len(list(path.iterdir()))
    assert [MANIFEST in there for there in seen] == [False] * (len(seen) - 1) + [True]


def test_the_rules_of_retention_hold_there_too(url: str, tmp_path: Path) -> None:
    for step in range(1, 9):
        mirror(url, keep_every=3).push(checkpoint.write(tmp_path / "old", make_snapshot(step)))
    assert names(url) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_what_was_given_up_does_not_come_back(url: str, tmp_path: Path) -> None:
    for step in (3, 5, 7):
        mirror(url, keep_last=9).push(checkpoint.write(tmp_path / "old", make_snapshot(step)))
    mirror(url).remove_after(4)
    assert names(url) == ["step-00000003"]
    assert mirror(url).pull(tmp_path / "new", told) == tmp_path / "new" / "step-00000003"


def test_a_step_that_was_written_anew_replaces_the_old_one(url: str, tmp_path: Path) -> None:
    """After a rollback the same step comes again with other weights."""
    mirror(url).push(checkpoint.write(tmp_path / "a", make_snapshot(4)))
    other = make_snapshot(9)._replace(state=make_snapshot(4).state)
    path = checkpoint.write(tmp_path / "b", other)
    mirror(url).push(path)
    mirror(url).push(path)
    found = mirror(url).pull(tmp_path / "new", told)
    assert found is not None
    assert same(checkpoint.load(found), other)


@pytest.mark.parametrize("damage", ["no manifest", "a file short", "a file gone"])
def test_what_is_not_whole_there_is_passed_over(url: str, tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(step)))
    files, root = fsspec.url_to_fs(url)
    last = f"{root}/step-00000002"
    if damage == "a file short":
        files.pipe_file(f"{last}/model.safetensors", files.cat_file(f"{last}/model.safetensors")[:-3])
    else:
        files.rm(f"{last}/{'MANIFEST.json' if damage == 'no manifest' else 'state.json'}")
    said: list[str] = []
    assert mirror(url).pull(tmp_path / "new", said.append) == tmp_path / "new" / "step-00000001"
    assert [("step-00000002" in text) for text in said] == [True] * (damage != "no manifest")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["step-00000001"]


def test_a_store_that_throttles_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Two of three requests are answered 503: each is made again, and the checkpoint arrives whole."""
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.0)
    count = 0

    def throttled(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count % 3:
                raise storage.Unreachable("503 SlowDown")
            return real(*given)

        return ask

    for name in ("upload", "listed"):
        monkeypatch.setattr(storage, name, throttled(getattr(storage, name)))
    mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(3)))
    found = mirror(url).pull(tmp_path / "new", told)
    assert found is not None
    assert same(checkpoint.load(found), make_snapshot(3))


@pytest.fixture
def front(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """Between us and the S3 server; the key is in `tmp_path / "keys"`."""
    del store
    with front_of(os.environ["AWS_ENDPOINT_URL"]) as made:
        for name, value in {**write_key(tmp_path / "keys", "FIRST"), "AWS_ENDPOINT_URL": made.url}.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield made
        fsspec.filesystem("s3").clear_instance_cache()


def test_credentials_that_expire_and_are_renewed(front: Front, tmp_path: Path) -> None:
    """Without a new start: the file that they came from is read again."""
    url = f"s3://bucket/runs/{tmp_path.name}"
    one = mirror(url, keep_last=9)
    paths = {step: checkpoint.write(tmp_path / "old", make_snapshot(step)) for step in (3, 4, 5)}
    one.push(paths[3])
    front.expired.add("FIRST")
    with pytest.raises(storage.Refused, match=r"token has expired\.; check the address and your credentials"):
        one.push(paths[4])
    write_key(tmp_path / "keys", "SECOND")
    one.push(paths[4])
    front.expired.add("SECOND")
    write_key(tmp_path / "keys", "THIRD")
    one.push(paths[5])  # nobody notices
    found = mirror(url).pull(tmp_path / "new", told)
    assert found is not None
    assert same(checkpoint.load(found), make_snapshot(5))
    assert names(url) == [f"step-{step:08d}" for step in (3, 4, 5)]


def test_a_server_that_says_slow_down(front: Front, tmp_path: Path) -> None:
    url = f"s3://bucket/runs/{tmp_path.name}"
    front.busy = 2
    mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(3)))
    assert front.busy == 0
    found = mirror(url).pull(tmp_path / "new", told)
    assert found is not None
    assert same(checkpoint.load(found), make_snapshot(3))


def test_a_listing_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It tells of a checkpoint that is no more: told, and the one before it is taken."""
    mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(3)))
    real = storage.listed

    def lying(place: str) -> set[str]:
        return real(place.replace("00000005", "00000003")) | ({"step-00000005"} if place == url else set())

    monkeypatch.setattr(storage, "listed", lying)
    said: list[str] = []
    assert mirror(url).pull(tmp_path / "new", said.append) == tmp_path / "new" / "step-00000003"
    assert len(said) == 1
    assert "step-00000005: damaged (MANIFEST.json: unreadable" in said[0]


def test_an_upload_that_is_cut_off_leaves_the_one_before_it_the_newest(tmp_path: Path, url: str) -> None:
    """As by preemption, which kills after 30 s. The same step is sent again from the beginning."""

    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    mirror(url).push(checkpoint.write(tmp_path / "old", make_snapshot(3)))
    newer = checkpoint.write(tmp_path / "old", make_snapshot(4))
    with pytest.raises(Killed):
        mirror(url).push(newer, kill)
    assert mirror(url).pull(tmp_path / "a", told) == tmp_path / "a" / "step-00000003"
    mirror(url).push(newer)
    found = mirror(url).pull(tmp_path / "b", told)
    assert found == tmp_path / "b" / "step-00000004"
    assert same(checkpoint.load(found), make_snapshot(4))


def test_a_place_that_nobody_knows() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.upload=nosuch://x"):
        mirror("nosuch://x")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_place_that_is_no_folder(tmp_path: Path, scheme: str) -> None:
    """To train from the start would not be what was meant."""
    (tmp_path / "r").write_text("a file where a folder belongs")
    (tmp_path / "r2").symlink_to(tmp_path / "r2")
    for name in ("r", "r2"):
        with pytest.raises(UserError, match=rf"/{name}: (Not a directory|Too many levels.*); check the address"):
            mirror(f"{scheme}{tmp_path}/{name}").pull(tmp_path / "new", told)


def test_training_never_waits_for_an_upload(tmp_path: Path) -> None:
    """A slow upload: later saves go on, only the newest waits for its turn; a failure is one warning."""
    begun, free, uploaded, said = threading.Event(), threading.Event(), list[str](), list[str]()

    def upload(path: Path, tick: Callable[[], None]) -> None:
        begun.set()
        assert free.wait(20)
        uploaded.append(path.name)
        if path.name.endswith("1"):
            raise RuntimeError("the network\nis gone")

    writer = Writer(
        tmp_path,
        WriterOptions(rank=0, num_writers=1, retention=Retention(keep_last=9), patience_seconds=9),
        said.append,
        upload=upload,
    )
    for step in range(1, 6):
        state = make_snapshot(step).state
        writer.submit(state, (), {}, "{}\n")
        writer.wait()
        assert begun.wait(20)
        assert checkpoint.verify(tmp_path / f"step-{step:08d}") == []
    free.set()
    writer.close()
    assert uploaded == ["step-00000001", "step-00000005"]
    assert len(said) == 1
    assert "step-00000001 was not uploaded (the network)" in said[0]
