"""manifest.json: round trip, atomic writing, and nothing but one line for whatever stands in it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloze.corpus.manifest import (
    NAME,
    VAL,
    Manifest,
    manifest_json,
    manifest_sha256,
    pass_name,
    read_manifest,
    sealed_json,
    write_manifest,
)
from cloze.errors import UserError
from pretrain.data.loader import TrainingCorpus
from tests.support import make_corpus
from tests.unit.corpora import FUZZ


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    path = tmp_path_factory.mktemp("manifest")
    return path, make_corpus(path, samples=20, val=5, passes=2, shards_per_split=2, samples_per_block=8)


@pytest.fixture
def broken(made: tuple[Path, Manifest]) -> Iterator[Callable[[Any], Path]]:
    """A function that puts bytes, or a value with its checksum made right, in the manifest's place for a while."""
    path, _ = made
    original = (path / NAME).read_bytes()

    def put(content: Any) -> Path:
        (path / NAME).write_bytes(content if isinstance(content, bytes) else sealed_json(content).encode())
        return path

    yield put
    (path / NAME).write_bytes(original)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_round_trip(made: tuple[Path, Manifest]) -> None:
    path, manifest = made
    assert read_manifest(path) == manifest
    text = (path / NAME).read_bytes()
    assert text.decode() == manifest_json(manifest)
    assert manifest_sha256(path) == hashlib.sha256(text).hexdigest()


def test_the_same_text_for_the_same_content(made: tuple[Path, Manifest]) -> None:
    _, manifest = made
    shuffled = replace(manifest, splits=dict(reversed(manifest.splits.items())), source={"b": 1, "a": 2})
    assert manifest_json(shuffled) == manifest_json(replace(manifest, source={"a": 2, "b": 1}))


def test_writing_leaves_the_old_one_or_the_new_one(
    made: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, manifest = made
    write_manifest(tmp_path, manifest)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, replace(manifest, seed=99))
    assert read_manifest(tmp_path) == manifest


def test_a_manifest_is_on_the_disk_before_it_has_its_name(
    made: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    replace_, size = Path.replace, (made[0] / NAME).stat().st_size
    monkeypatch.setattr(os, "fsync", lambda number: done.append(("synced", os.fstat(number).st_size)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: [done.append(("named", self.stat().st_size)), replace_(self, to)][1]
    )
    write_manifest(tmp_path, made[1])
    assert done == [("synced", size), ("named", size)]


def test_pass_names_are_those_a_reader_takes() -> None:
    assert [pass_name(p) for p in (0, 9, 10, 100)] == ["pass-00", "pass-09", "pass-10", "pass-100"]


# What is not a manifest


def test_not_there(tmp_path: Path) -> None:
    assert "that `python -m data_prep` finished" in refusal(tmp_path)
    (tmp_path / ".work").mkdir()
    assert "run the same data_prep command again" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"format": "cloze-shards"}', b"[" * 100_000, b"1" * 5_000, b"NaN"],
)
def test_not_a_manifest(broken: Callable[[Any], Path], content: bytes) -> None:
    refusal(broken(content))


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    refusal(tmp_path)


# Manifests that lie

Change = Callable[[Any], object]


def set_at(*keys: Any, to: Any) -> Change:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = to

    return change


CHANGES: dict[str, Change] = {
    "a newer version": set_at("version", to=3),
    "no tokenizer": lambda body: body.pop("tokenizer"),
    "a name with ..": set_at("shards", 0, "name", to="../000000.tar"),
    "a nested name": set_at("shards", 0, "name", to="a/000000.tar"),
    "an absolute name": set_at("shards", 0, "name", to="/etc/passwd.tar"),
    "a hidden name": set_at("shards", 0, "name", to=".tar"),
    "a name with a line break": set_at("shards", 0, "name", to="a.tar\n"),
    "a split with ..": set_at("shards", 0, "split", to="../pass-00"),
    "a split nobody listed": set_at("shards", 0, "split", to="pass-77"),
    "one id twice": set_at("shards", 0, "id", to=1),
    "one name twice": set_at("shards", 0, "name", to="000001.tar"),
    "an id beyond 32 bits": set_at("shards", 0, "id", to=2**32),
    "a negative count": set_at("shards", 0, "samples", to=-1),
    "a count as text": set_at("max_len", to="24"),
    "a count as a float": set_at("max_len", to=24.0),
    "a count as a truth value": set_at("baked_draws", to=True),
    "fewer samples than blocks hold": set_at("shards", 0, "samples", to=9),
    "another total": set_at("splits", "pass-00", "samples", to=21),
    "another total of tokens": set_at("splits", "val", "tokens", to=1),
    "columns of other lengths": lambda body: body["shards"][0]["blocks"]["crc32"].pop(),
    "blocks that overlap": set_at("shards", 0, "blocks", "offsets", 1, to=0),
    "a block off the tar's grid": set_at("shards", 0, "blocks", "offsets", 1, to=513),
    "a block beyond the file": set_at("shards", 0, "bytes", to=512),
    "no statistics of a pass": lambda body: body["splits"].pop("pass-01"),
    "more passes than there are": set_at("passes", to=3),
    "passes without end": set_at("passes", to=2**62),
    "fewer passes than there are": set_at("passes", to=1),
    "splits as a list": set_at("splits", to=[1, 2]),
    "shards as a number": set_at("shards", to=7),
    "shards as a table": set_at("shards", to={"a": 1}),
    "a shard that is null": set_at("shards", 0, to=None),
    "probability NaN": set_at("masking", "probability", to=float("nan")),
    "probability 0": set_at("masking", "probability", to=0),
    "probability as text": set_at("masking", "probability", to="half"),
    "a special outside the vocabulary": set_at("tokenizer", "mask_id", to=61),
    "a vocabulary beyond 32 bits": set_at("tokenizer", "vocab_size", to=2**33),
    "an objective nobody knows": set_at("objective", to="rtd"),
    "max_len 4": set_at("max_len", to=4),
    "max_len 65536": set_at("max_len", to=65536),
    "no fingerprint": set_at("tokenizer", "fingerprint", to="abc"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", CHANGES)
def test_a_lie_is_refused(made: tuple[Path, Manifest], broken: Callable[[Any], Path], name: str) -> None:
    body = json.loads(manifest_json(made[1]))
    CHANGES[name](body)
    refusal(broken(body))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 512, 2**16, 2**31, 2**32, 2**33, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["pass-00", "val", "000000.tar", "../x.tar", "0" * 64, "nsp", "none", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(body, dict):
        items = list(body.items())
    elif isinstance(body, list):
        items = list(enumerate(body))
    for key, value in items:
        yield body, key
        yield from places(value)


@pytest.mark.timeout(120 * FUZZ)
@settings(max_examples=300 * FUZZ, deadline=None)
@example(None)
@given(st.none() | st.data())
def test_any_manifest_is_refused_in_one_line_or_used(made: tuple[Path, Manifest], data: st.DataObject | None) -> None:
    """Some values of a right one are replaced, removed or added, and the checksum is made right for most.

    A corpus that opens is then read through.
    """
    path, manifest = made
    original = (path / NAME).read_bytes()
    body = json.loads(manifest_json(manifest))
    for _ in range(data.draw(st.integers(1, 2)) if data else 0):
        container, key = data.draw(st.sampled_from(list(places(body))))
        action = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
        if action == "replace":
            container[key] = data.draw(values)
        elif action == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(container[key])
        if not list(places(body)):
            break
    seal = sealed_json if data is None or data.draw(st.integers(0, 9)) else json.dumps
    (path / NAME).write_text(seal(body))
    try:
        with suppress(UserError):
            corpus = TrainingCorpus(path)
            corpus.training_batch(1, np.arange(0, sum(corpus.pass_sizes), dtype=np.int64))
            if corpus.num_val:
                corpus.val_batch(np.arange(corpus.num_val))
    finally:
        (path / NAME).write_bytes(original)


def test_the_split_of_a_manifest_without_val(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, samples=6, val=0)
    assert VAL not in manifest.splits
    assert read_manifest(tmp_path).split_shards(VAL) == ()
    assert TrainingCorpus(tmp_path).num_val == 0
