"""Files wherever they lie: a local path, or a URL that fsspec understands (s3://, gs://, https://, memory://)."""

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from cloze.errors import UserError, first_line
from cloze.files import rename

T = TypeVar("T")

_TRIES = 4
_PAUSE_SECONDS = 1.0  # before the second try; each further one waits twice as long
_CHUNK_BYTES = 8 << 20


class Missing(UserError):
    """There is nothing there."""


class Unreachable(UserError):
    """A store did not give what it has, perhaps for a moment."""


class Refused(UserError):
    """A store did not let us in. Whoever asks again is asked for the credentials that are there by then."""


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    bytes: int
    version: int  # modification time in ns, or a hash of what the store says of the object


def changed(path: str) -> UserError:
    return UserError(f"{path}: changed since the preparation began; start again in a new `out`")


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    try:
        return Path(path.removeprefix("file://")).expanduser()
    except RuntimeError as error:  # of `~` without a home, `~somebody` without such a user
        raise UserError(f"{path}: {first_line(error)}; write the whole path") from error


def on_disk(path: str) -> Path:
    """Of a corpus that is to be looked into here. Raises `UserError` of one that lies elsewhere."""
    if is_remote(path):
        raise UserError(f"{path}: not on this machine; copy the corpus into a directory, and name that")
    return local_path(path)


def open_input(path: str) -> BinaryIO:
    """The file to read, as bytes; it can seek."""
    if not is_remote(path):
        return Path(path).open("rb")
    file_system, name = _remote(path)
    return io.BufferedReader(file_system.open(name, "rb"))  # not every store's file has a bounded readline


def stamp(path: str) -> Stamp:
    """Size and version. Raises `OSError`, or `UserError` of a URL, where there is no such file."""
    if not is_remote(path):
        stat = Path(path).stat()
        return Stamp(stat.st_size, stat.st_mtime_ns)
    with _asked(path) as (store, name):
        info = store.info(name)
        if info.get("size") is None:
            raise OSError("the server does not tell its size")
        # What else stands in `info` depends on whether it comes from a listing.
        tag = next((str(info[key]) for key in ("ETag", "etag", "md5Hash") if info.get(key)), None) or store.ukey(name)
        return Stamp(int(info["size"]), int(hashlib.sha256(tag.encode()).hexdigest()[:15], 16))


def remote_matches(pattern: str) -> list[str]:
    """The files that a URL or a URL with wildcards names, sorted; none if there is none."""
    protocol = pattern.partition("://")[0]
    with _asked(pattern) as (store, name):
        found = sorted(store.glob(name)) if any(mark in name for mark in "*?[") else [name]
        return [f"{protocol}://{str(each).partition('://')[2] or each}" for each in found if store.isfile(each)]


def put(file: Path, place: str) -> None:
    """Rename or upload a local file to `place`, whole or not at all. Raises `UserError` where a store refuses it."""
    if is_remote(place):
        upload(file, place)
    else:
        rename(file, local_path(place))


def upload(file: Path, url: str) -> None:
    """Copy a local file to `url`, whole or not at all, as object stores do. Raises `UserError` where that fails."""
    size = file.stat().st_size
    with _asked(url) as (store, name):
        store.put_file(str(file), name)
        store.invalidate_cache()
        stored = store.info(name)["size"]
    if stored != size:
        raise UserError(f"{url}: {stored} of {size} bytes arrived; run the same command again")


def download(place: str) -> bytes | None:
    """What lies at `place`; None if nothing does."""
    if not is_remote(place):
        return local_path(place).read_bytes() if local_path(place).is_file() else None
    try:
        return patiently(lambda: read_range(place))
    except Missing:
        return None


def read_range(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes `start` to `end` - 1: all of the file where a server knows no ranges. Raises `Missing`, `Unreachable`."""
    with _asked(url) as (store, name):
        return bytes(store.cat_file(name, start=start, end=end))


def fetch(url: str, path: Path, stop: Callable[[], object] = lambda: None) -> None:
    """Append to `path` what it lacks of the file at `url`. Calls `stop` now and then, which may raise."""

    def go_on() -> None:
        with path.open("ab") as out:
            for place, data in _parts(url, out.tell()):
                out.truncate(place)
                out.write(data)
                stop()
            out.flush()
            os.fsync(out.fileno())

    path.touch()
    patiently(go_on, lambda: path.stat().st_size)


def _parts(url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """(first byte, bytes) of what follows byte `start`, or of all where the server knows no ranges."""

    def read(file: Any, place: int) -> Iterator[tuple[int, bytes]]:
        with file:
            file.seek(place)
            while data := file.read(_CHUNK_BYTES):
                yield place, data
                place += len(data)

    with _asked(url) as (store, name):
        try:
            yield from read(store.open(name, "rb"), start)
        except ValueError:  # fsspec's, of a web server that gives no part of a file: all of it then, in one stream
            yield from read(store.open(name, "rb", block_size=0), 0)


def patiently(action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """`action()`, again after a pause where it was `Unreachable`; tries that made `progress` do not count.

    Where it was `Refused`, once more, at once: credentials expire, and somebody renews them.
    """
    tries, refused = 0, False
    while True:
        before = progress()
        try:
            return action()
        except Refused:
            if refused:
                raise
            refused = True
            continue
        except Unreachable:
            tries = 1 if progress() > before else tries + 1
            if tries == _TRIES:
                raise
        time.sleep(_PAUSE_SECONDS * 2 ** (tries - 1))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(url: str) -> None:
    """Raises `UserError` where nothing here understands the URL."""
    _remote(url)


def make_folder(url: str) -> None:
    """Make it and those above, where the store has folders."""
    with _asked(url) as (store, name):
        store.makedirs(name, exist_ok=True)


def listed(place: str) -> set[str]:
    """The names right below `place`; none if there is nothing."""
    if not is_remote(place):
        try:
            return {entry.name for entry in local_path(place).iterdir()}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}; check the address and what you may read") from error
    with _asked(place) as (store, name):
        store.invalidate_cache()
        try:
            return {found.rstrip("/").rpartition("/")[2] for found in store.ls(name, detail=False)}
        except FileNotFoundError:
            return set()


def remove(url: str) -> None:
    """Remove what is at `url`, a file or a folder, if anything is."""
    with _asked(url) as (store, name):
        if store.exists(name):
            store.rm(name, recursive=store.isdir(name))


@contextmanager
def _asked(url: str) -> Iterator[tuple[Any, str]]:
    """The store and the name in it. Every store's client has exceptions of its own; all become one line.

    A client that was refused is given up: it would keep for ever the credentials that it has read.
    """
    try:
        yield _remote(url)
    except UserError:
        raise
    except Exception as error:
        kind: type[UserError] = Unreachable
        if isinstance(error, FileNotFoundError):
            kind = Missing
        elif isinstance(error, PermissionError):
            kind = Refused
            type(_remote(url)[0]).clear_instance_cache()
        raise kind(f"{url}: {first_line(error)}; check the address and your credentials, then run it again") from error


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(path))
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install 'cloze[s3]' or 'cloze[gcs]' or 'cloze[http]'") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; name a path or a URL that fsspec understands") from error
