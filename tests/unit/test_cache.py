"""A node's copy of a remote corpus: copied once, checked, continued, evicted."""

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.http import HTTPFileSystem

from cloze import storage
from cloze.corpus.manifest import Manifest, read_manifest
from cloze.errors import ExitCode, Stopped, UserError
from pretrain.data import cache
from pretrain.data.cache import local_corpus
from tests.support import ROOT, Hub, environment, make_corpus, served


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", samples=600, val=20)
    return tmp_path / "corpus"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is read at a time is less than a shard."""
    monkeypatch.setattr("fsspec.implementations.http.DEFAULT_BLOCK_SIZE", 4096)
    monkeypatch.setattr(storage, "_CHUNK_BYTES", 3000)
    HTTPFileSystem.clear_instance_cache()
    yield
    HTTPFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses between tries are short, and what a test used is not in use after it."""
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.001)
    yield
    let_go()


def let_go() -> None:
    """As at the end of a job."""
    while cache._in_use:
        os.close(cache._in_use.pop())


def same_files(one: Path, other: Path) -> bool:
    names = ["manifest.json", *(f"{s.split}/{s.name}" for s in read_manifest(one).shards)]
    names += [f"tokenizer/{path.name}" for path in (other / "tokenizer").iterdir()]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def size_of(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards)


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_local_directory_is_read_in_place(corpus: Path) -> None:
    assert local_corpus(str(corpus), None, 1) == local_corpus(f"file://{corpus}", None, 1) == corpus


def test_a_url_needs_a_cache() -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        local_corpus("s3://bucket/corpus", None, 1)


# Copying


def test_copied_over_http_once(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(corpus) as (url, requests):
        copy = local_corpus(url, str(tmp_path / "cache"), 1)
        assert same_files(copy, corpus)
        requests.clear()
        assert local_corpus(url, str(tmp_path / "cache"), 1) == copy
        assert requests == ["/manifest.json"]
    total = size_of(read_manifest(corpus)) / 1e6
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"copying the corpus: {total:.0f} of {total:.0f} MB"
    assert len(lines) <= 4  # one a shard at most


def test_a_bar_on_a_terminal(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, as everything that is for people."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    local_corpus(str(corpus), str(tmp_path / "cache"), 1)
    printed = capsys.readouterr()
    assert printed.out == ""
    (total,) = {float(size) for size in re.findall(r"/([\d.]+) kB", printed.err)}
    assert total == pytest.approx(size_of(read_manifest(corpus)) / 1e3, abs=0.06)
    assert f"{total:.1f}/{total:.1f} kB" in printed.err


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_copy_goes_on(corpus: Path, tmp_path: Path, ranges: bool) -> None:
    """With what is missing, or from the beginning where the server knows no byte ranges."""
    shard = read_manifest(corpus).shards[0]
    with served(corpus, ranges=ranges) as (url, requests):
        copy = local_corpus(url, str(tmp_path / "cache"), 1)
        whole = copy / shard.split / shard.name
        half = whole.read_bytes()[: shard.bytes // 2]
        whole.unlink()
        whole.with_suffix(".part").write_bytes(half)
        (copy / "manifest.json").unlink()
        requests.clear()
        assert same_files(local_corpus(url, str(tmp_path / "cache"), 1), corpus)
    asked = [request for request in requests if ".tar" in request]
    assert {request.split()[0] for request in asked} == {f"/{shard.split}/{shard.name}"}
    assert not ranges or any(f"bytes={len(half)}-" in request for request in asked)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("fault", ["drop", "503"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_fault_that_passes(corpus: Path, tmp_path: Path, fault: str, ranges: bool) -> None:
    """Every third answer is one, of manifest, tokenizer and shards."""
    count = itertools.count(1)
    with served(corpus, ranges=ranges, fault=lambda path: next(count) % 3 == 0 and fault) as (url, _):
        assert same_files(local_corpus(url, str(tmp_path / "cache"), 1), corpus)


@pytest.mark.parametrize("fault", ["drop", "503"])
@pytest.mark.parametrize("where", ["manifest.json", "tokenizer_config.json", "000001.tar"])
def test_a_fault_that_stays(corpus: Path, tmp_path: Path, fault: str, where: str) -> None:
    """One line, and nothing that looks whole; when the server is mended the copy is completed."""
    broken = [True]
    with served(corpus, fault=lambda path: broken[0] and where in path and fault) as (url, _):
        with pytest.raises(UserError, match=f"{where}.*check the address") as caught:
            local_corpus(url, str(tmp_path / "cache"), 1)
        one_line(caught)
        assert not list(tmp_path.glob("cache/*/manifest.json"))
        broken.clear()
        broken.append(False)
        assert same_files(local_corpus(url, str(tmp_path / "cache"), 1), corpus)


def test_another_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "other", samples=20, vocab_size=63)
    shutil.copytree(tmp_path / "other" / "tokenizer", corpus / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(UserError, match="is not the one that the shards were made with"):
        local_corpus(str(corpus), str(tmp_path / "cache"), 1)


def test_a_shard_that_changed_is_refused(corpus: Path, tmp_path: Path) -> None:
    shard = read_manifest(corpus).shards[0]
    flip(corpus / shard.split / shard.name)
    with pytest.raises(UserError, match="checksum"):
        local_corpus(str(corpus), str(tmp_path / "cache"), 1)
    copies = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert copies
    assert not any((folder / "manifest.json").exists() for folder in copies)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("source", "words"),
    [("{}/nowhere", "not there"), ("nosuch://x", "nosuch"), ("http://127.0.0.1:9", "check the address")],
)
def test_a_missing_source_is_one_line(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        local_corpus(source.format(tmp_path), str(tmp_path / "cache"), 1)
    one_line(caught)


def test_a_request_to_stop_ends_a_copy(corpus: Path, tmp_path: Path) -> None:
    """After the first piece that arrives; what it brought is kept."""
    asked = iter([False, True])
    with pytest.raises(Stopped, match="the same command goes on") as caught:
        local_corpus(str(corpus), str(tmp_path / "cache"), 1, stop=lambda: next(asked))
    assert caught.value.exit_code is ExitCode.STOPPED
    assert list(tmp_path.glob("cache/*/*/*.tar"))
    assert same_files(local_corpus(str(corpus), str(tmp_path / "cache"), 1), corpus)


def test_copied_from_a_hub(corpus: Path, tmp_path: Path) -> None:
    """hf:// in a process of its own: where the hub is, is read once a process."""
    pytest.importorskip("huggingface_hub")
    script = "import sys; from pretrain.data.cache import local_corpus; print(local_corpus(*sys.argv[1:], 1))"
    with served(corpus, kind=Hub) as (url, requests):
        command = [sys.executable, "-c", script, "hf://datasets/org/books", str(tmp_path / "cache")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment() | {"HF_ENDPOINT": url}, capture_output=True, text=True, timeout=200
        )
    assert done.returncode == 0, done.stderr
    assert same_files(Path(done.stdout.strip()), corpus)
    assert any(".tar bytes=0-" in request for request in requests)


def test_ranks_copy_once(corpus: Path, tmp_path: Path) -> None:
    """Three processes at once: each file is asked for by one of them."""
    script = "import sys; from pretrain.data.cache import local_corpus; local_corpus(sys.argv[1], sys.argv[2], 1)"
    with served(corpus, delay_seconds=0.05) as (url, requests):
        command = [sys.executable, "-c", script, url, str(tmp_path / "cache")]
        ranks = [subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) for _ in range(3)]
        assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    shards = [request for request in requests if ".tar bytes" in request]
    assert len(shards) == len({*shards}) == len(read_manifest(corpus).shards)
    (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert same_files(copy, corpus)


# Room


def corpora(tmp_path: Path, count: int) -> list[Path]:
    paths = [tmp_path / f"corpus-{number}" for number in range(count)]
    for seed, path in enumerate(paths):
        make_corpus(path, samples=600, seed=seed)
    return paths


def cached(tmp_path: Path, paths: list[Path]) -> list[bool]:
    names = [hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:16] for path in paths]
    return [(tmp_path / "cache" / name).is_dir() for name in names]


def test_the_cache_is_bounded(corpus: Path, tmp_path: Path) -> None:
    size = size_of(read_manifest(corpus)) / 2**30
    with pytest.raises(UserError, match=r"data\.cache_gib allows .*data\.access=stream"):
        local_corpus(str(corpus), str(tmp_path / "cache"), size / 2)


def test_the_corpus_used_longest_ago_makes_room(tmp_path: Path) -> None:
    paths = corpora(tmp_path, 3)
    room = 2.5 * max(size_of(read_manifest(path)) for path in paths) / 2**30
    for number, path in enumerate([paths[0], paths[1], paths[0]]):
        os.utime(local_corpus(str(path), str(tmp_path / "cache"), room), (number, number))
        let_go()
    copy = local_corpus(str(paths[2]), str(tmp_path / "cache"), room)
    assert cached(tmp_path, paths) == [True, False, True]
    assert same_files(copy, paths[2])


def test_what_a_job_reads_stays(tmp_path: Path) -> None:
    """The cache does not grow beyond its bound for another: that is refused."""
    paths = corpora(tmp_path, 2)
    size = max(size_of(read_manifest(path)) for path in paths)
    copy = local_corpus(str(paths[0]), str(tmp_path / "cache"), 1)
    with pytest.raises(UserError, match=r"jobs that run use .*choose another") as caught:
        local_corpus(str(paths[1]), str(tmp_path / "cache"), 1.5 * size / 2**30)
    one_line(caught)
    assert same_files(copy, paths[0])
    assert cache._size(tmp_path / "cache") < 1.5 * size
    let_go()
    assert same_files(local_corpus(str(paths[1]), str(tmp_path / "cache"), 1.5 * size / 2**30), paths[1])


def test_killed_while_it_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half removed does not look whole: its next user copies what is missing."""
    paths = corpora(tmp_path, 2)
    room = 1.5 * max(size_of(read_manifest(path)) for path in paths) / 2**30
    copy = local_corpus(str(paths[0]), str(tmp_path / "cache"), room)
    let_go()

    class Killed(BaseException):
        pass

    def half(folder: Path) -> None:
        next(folder.glob("*/*.tar")).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(Killed):
        local_corpus(str(paths[1]), str(tmp_path / "cache"), room)
    monkeypatch.undo()
    let_go()
    assert local_corpus(str(paths[0]), str(tmp_path / "cache"), room) == copy
    assert same_files(copy, paths[0])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "the end": lambda path: path.write_bytes(path.read_bytes()[:-600]),
    "all of it": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_copy_in_doubt_is_mended(corpus: Path, tmp_path: Path, damage: str) -> None:
    shard = read_manifest(corpus).shards[1]
    with served(corpus) as (url, requests):
        copy = local_corpus(url, str(tmp_path / "cache"), 1)
        DAMAGE[damage](copy / shard.split / shard.name)
        cache.mark_suspect(copy)
        requests.clear()
        assert local_corpus(url, str(tmp_path / "cache"), 1) == copy
    assert same_files(copy, corpus)
    assert {request.split()[0] for request in requests if ".tar" in request} == {f"/{shard.split}/{shard.name}"}
