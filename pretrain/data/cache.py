"""A node's own copy of a corpus that lies in object storage, on a web server or on a slow file system.

Copied once per node, shard after shard in sequence, each checked against the manifest's sha256 before it gets its
name; an interrupted copy goes on where it stopped. All ranks of a node share it. Remote paths are fsspec's.
"""

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from cloze import ownership, storage
from cloze.corpus.manifest import NAME, VAL, ShardEntry, is_held_out, read_manifest
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import DiskError, Stopped, UserError
from cloze.files import rename
from cloze.log import log
from cloze.ownership import CORPUS_COPY

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_POLL_SECONDS = 0.5

_in_use: list[int] = []  # file descriptors with the shared locks that this process holds to its end


def local_corpus(
    path: str,
    cache_dir: str | None,
    cache_gib: float,
    held_out_only: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The directory to read: `path` itself if it is local and no `cache_dir` is set, else its verified copy.

    With `held_out_only` the shards of held-out splits are copied, and no others (they are streamed).

    Every rank calls this; the first one of a node copies, the others wait. Raises `UserError` when the source cannot
    be read or is not what its manifest says, or the corpus is larger than the cache may be, and `Stopped` soon after
    `stop` says so.
    """
    if cache_dir is None:
        if storage.is_remote(path):
            raise UserError(f"data.path={path}: is remote; set data.cache_dir to a local directory with room for it")
        return storage.local_path(path)
    source, cache = path.rstrip("/"), storage.local_path(cache_dir)
    manifest_bytes = _needed(f"{source}/{NAME}")
    name = hashlib.sha256(manifest_bytes).hexdigest()[:16]
    folder = cache / (f"{name}-{VAL}" if held_out_only else name)

    def check() -> None:
        if stop():
            raise Stopped(f"data.cache_dir={cache_dir}: stopped while copying; the same command goes on")

    try:
        cache.mkdir(parents=True, exist_ok=True)
        _in_use.append(os.open(_use_lock(folder), os.O_RDWR | os.O_CREAT, 0o666))
        fcntl.flock(_in_use[-1], fcntl.LOCK_SH)  # from now on nobody removes it to make room
        folder.mkdir(exist_ok=True)
        if not (folder / NAME).exists():
            with _locked(cache / ".filling", check):  # one copy at a time: two would not see what the other needs
                if not (folder / NAME).exists():
                    _fill(source, folder, manifest_bytes, cache_gib, held_out_only, check)
        os.utime(folder)  # the least recently used corpus is the first to go
    except OSError as error:
        raise DiskError(f"data.cache_dir={cache_dir}: {error}; free space there or choose another") from error
    return folder


def mark_suspect(folder: Path) -> None:
    """Let the next start check every file of a copy, and copy again those that are damaged."""
    (folder / NAME).unlink(missing_ok=True)


def _fill(
    source: str,
    folder: Path,
    manifest_bytes: bytes,
    cache_gib: float,
    held_out_only: bool,
    check: Callable[[], None],
) -> None:
    """Copy everything, the manifest last."""
    _claim(folder)
    partial = folder / "partial"
    partial.mkdir(exist_ok=True)
    (partial / NAME).write_bytes(manifest_bytes)
    manifest = read_manifest(partial)
    wanted = [shard for shard in manifest.shards if is_held_out(shard.split) or not held_out_only]
    need = sum(shard.bytes for shard in wanted)
    _make_room(folder, need, int(cache_gib * 2**30))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        data = storage.download(f"{source}/tokenizer/{name}")
        if data is not None:  # not every tokenizer has all four
            (tokenizer / name).write_bytes(data)
    if load_tokenizer(tokenizer).facts != manifest.tokenizer:
        raise UserError(f"{source}/tokenizer: is not the one that the shards were made with; upload the corpus again")
    with _progress(need) as advance:
        for shard in wanted:
            target = folder / shard.split / shard.name
            target.parent.mkdir(exist_ok=True)
            if not (target.exists() and _is(target, shard)):
                _copy(f"{source}/{shard.split}/{shard.name}", target, shard, check)
            advance(shard.bytes)
    rename(partial / NAME, folder / NAME)
    partial.rmdir()


def _copy(url: str, target: Path, shard: ShardEntry, check: Callable[[], None]) -> None:
    """One shard, from where an earlier try stopped; where that gives something else, once more from the beginning."""
    part = target.with_suffix(".part")
    for _ in range(2):
        storage.fetch(url, part, check)
        if _is(part, shard):
            rename(part, target)
            return
        part.unlink()
    raise UserError(f"{url}: does not match the manifest's size and checksum; upload it again")


def _claim(folder: Path) -> None:
    """Make it known as ours. Raises `UserError` where something else lies in it."""
    if (other := next(ownership.foreign(folder, CORPUS_COPY), None)) and not ownership.is_of(folder, CORPUS_COPY):
        raise UserError(f"{folder}: holds {other}, which no copy does; move it away, or choose another data.cache_dir")
    ownership.mark(folder, CORPUS_COPY)


def _is(file: Path, shard: ShardEntry) -> bool:
    return file.stat().st_size == shard.bytes and storage.sha256(file) == shard.sha256


def _make_room(folder: Path, need: int, limit: int) -> None:
    """Remove whole copies, least recently used first, until `need` bytes fit below `limit`.

    What else lies in `data.cache_dir` does not count, and never goes; nor does a copy in which somebody keeps more.
    """
    told = f"the corpus has {need / 2**30:.2f} GiB, data.cache_gib allows {limit / 2**30:.2f}"
    if need > limit:
        raise UserError(f"{told}; raise it, or use data.access=stream")
    copies = (path for path in folder.parent.iterdir() if path != folder and ownership.is_of(path, CORPUS_COPY))
    others = sorted(copies, key=lambda path: path.stat().st_mtime)
    used = sum(_size(other) for other in others)
    for other in others:
        if used + need <= limit:
            break
        if not ownership.is_own(other, CORPUS_COPY):
            continue
        with _use_lock(other).open("a") as lock, suppress(BlockingIOError):  # else a job reads it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            used -= _size(other)
            ownership.mark(other, CORPUS_COPY)  # an older version's, whose manifest was the proof
            mark_suspect(other)  # first: what is half removed must not look whole
            ownership.remove_own(other, CORPUS_COPY)
    if used + need > limit:
        raise UserError(
            f"{told}, and jobs that run use {used / 2**30:.2f} of it (or copies in which somebody keeps more); raise "
            "it, or choose another data.cache_dir"
        )


def _use_lock(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.in-use"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _needed(url: str) -> bytes:
    data = storage.download(url)
    if data is None:
        raise UserError(f"{url}: not there; check the path and your credentials")
    return data


@contextmanager
def _locked(path: Path, check: Callable[[], None]) -> Iterator[None]:
    with path.open("a") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            check()
            time.sleep(_POLL_SECONDS)
        yield


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, else a line every tenth."""
    if sys.stderr.isatty():
        columns = "copying the corpus", BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda size: bar.advance(task, size)
        return
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        before, done = done, done + size
        if total and before * 10 // total != done * 10 // total:
            log.info(f"copying the corpus: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

    yield advance
