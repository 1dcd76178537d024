"""A node's own copy of a corpus that lies in object storage, on a web server or on a slow file system.

Copied once per node, shard after shard in sequence, each checked against the manifest's sha256 before it gets its
name; an interrupted copy goes on where it stopped. All ranks of a node share it. Remote paths are fsspec's.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from data_prep.errors import DiskError, UserError
from data_prep.manifest import NAME, ShardEntry, read_manifest

_CHUNK_BYTES = 8 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_TRIES = 5

_in_use: list[int] = []  # file descriptors with the shared locks that this process holds to its end


def local_corpus(path: str, cache_dir: str | None, cache_gib: float, splits: Sequence[str] | None = None) -> Path:
    """The directory to read: `path` itself if it is local and no `cache_dir` is set, else its verified copy.

    With `splits` only their shards are copied (the others are streamed).

    Every rank calls this; the first one of a node copies, the others wait. Raises `UserError` when the source cannot
    be read or is not what its manifest says, or the corpus is larger than the cache may be.
    """
    if cache_dir is None:
        if "://" in path:
            raise UserError(f"data.path={path}: is remote; set data.cache_dir to a local directory with room for it")
        return Path(path)
    source = path.rstrip("/")
    manifest_bytes = _small_file(f"{source}/{NAME}")
    name = hashlib.sha256(manifest_bytes).hexdigest()[:16]
    folder = Path(cache_dir) / (name if splits is None else "-".join([name, *splits]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(Path(cache_dir) / f".{folder.name}.filling"):
            _in_use.append(os.open(_use_lock(folder), os.O_RDWR | os.O_CREAT, 0o666))
            fcntl.flock(_in_use[-1], fcntl.LOCK_SH)
            if not (folder / NAME).exists():
                _fill(source, folder, manifest_bytes, cache_gib, splits)
            os.utime(folder)  # the least recently used corpus is the first to go
    except OSError as error:
        raise DiskError(f"data.cache_dir={cache_dir}: {error}; free space there or choose another") from error
    return folder


def _fill(source: str, folder: Path, manifest_bytes: bytes, cache_gib: float, splits: Sequence[str] | None) -> None:
    """Copy everything, the manifest last."""
    partial = folder / "partial"
    partial.mkdir(exist_ok=True)
    (partial / NAME).write_bytes(manifest_bytes)
    manifest = read_manifest(partial)
    wanted = [shard for shard in manifest.shards if splits is None or shard.split in splits]
    need = sum(shard.bytes for shard in wanted)
    _make_room(folder, need, int(cache_gib * 2**30))
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        try:
            (folder / "tokenizer" / name).write_bytes(_small_file(f"{source}/tokenizer/{name}"))
        except UserError:
            continue  # not every tokenizer has all four
    with _progress(need) as advance:
        for shard in wanted:
            target = folder / shard.split / shard.name
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                _copy(f"{source}/{shard.split}/{shard.name}", target, shard)
            advance(shard.bytes)
    (partial / NAME).replace(folder / NAME)
    partial.rmdir()


def _copy(url: str, target: Path, shard: ShardEntry) -> None:
    """One shard, from where an earlier try stopped."""
    part = target.with_suffix(".part")
    for attempt in range(_TRIES):
        try:
            _append(url, part, shard.bytes)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (28, 122):  # the local disk is full, or the quota
                raise
            if attempt + 1 == _TRIES:
                raise UserError(f"{url}: cannot be read ({error}); check the path and your credentials") from error
            time.sleep(2**attempt)
            continue
        if part.stat().st_size == shard.bytes and _sha256(part) == shard.sha256:
            part.rename(target)
            return
        part.unlink()
    raise UserError(f"{url}: does not match the manifest's size and checksum; upload it again")


def _append(url: str, part: Path, size: int) -> None:
    with part.open("ab") as out:
        if (start := out.tell()) >= size:
            return
        with fsspec.open(url, "rb").open() as remote:
            remote.seek(start)
            while chunk := remote.read(_CHUNK_BYTES):
                out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def _make_room(folder: Path, need: int, limit: int) -> None:
    """Remove whole corpora, least recently used first, until `need` bytes fit below `limit`."""
    if need > limit:
        raise UserError(
            f"the corpus has {need / 2**30:.1f} GiB, data.cache_gib allows {limit / 2**30:.1f}; "
            "raise it, or use data.access=stream"
        )
    others = sorted((p for p in folder.parent.iterdir() if p.is_dir() and p != folder), key=lambda p: p.stat().st_mtime)
    used = sum(_size(other) for other in others)
    for other in others:
        if used + need <= limit:
            return
        with _use_lock(other).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # a job reads it
            used -= _size(other)
            shutil.rmtree(other)


def _use_lock(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.in-use"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _small_file(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb").open() as file:
            return bytes(file.read())
    except ImportError as error:
        raise UserError(f"{url}: {error}; pip install 'cloze[http]', 'cloze[s3]' or 'cloze[gcs]'") from error
    except Exception as error:  # every store's client has exceptions of its own, for missing credentials above all
        raise UserError(f"{url}: cannot be read ({error}); check the path and your credentials") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal, else a line every tenth."""
    if sys.stderr.isatty():
        with Progress("copying the corpus", BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
            task = bar.add_task("", total=total)
            yield lambda size: bar.advance(task, size)
        return
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        before, done = done, done + size
        if total and before * 10 // total != done * 10 // total:
            print(f"copying the corpus: {done / 1e6:.0f} of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

    yield advance
