"""Files wherever they lie: a local path, or a URL that fsspec understands (s3://, gs://, https://, memory://)."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data_prep.errors import UserError


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    bytes: int
    version: int  # modification time in ns, or a hash of what the store says of the object


def changed(path: str) -> UserError:
    return UserError(f"{path}: changed since the preparation began; start again in a new `out`")


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()


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
    if not is_remote(place):
        file.replace(local_path(place))
        return
    size = file.stat().st_size
    with _asked(place) as (store, name):
        store.put_file(str(file), name)
        store.invalidate_cache()
        stored = store.info(name)["size"]
    if stored != size:
        raise UserError(f"{place}: {stored} of {size} bytes arrived; run the same command again")


def fetch(place: str) -> bytes | None:
    """What lies at `place`; None if nothing does."""
    if not is_remote(place):
        return local_path(place).read_bytes() if local_path(place).is_file() else None
    with _asked(place) as (store, name):
        store.invalidate_cache()
        return bytes(store.cat_file(name)) if store.exists(name) else None


def listed(place: str) -> set[str]:
    """The names right below `place`; none if there is nothing."""
    if not is_remote(place):
        return {entry.name for entry in local_path(place).iterdir()} if local_path(place).is_dir() else set()
    with _asked(place) as (store, name):
        store.invalidate_cache()
        try:
            return {found.rstrip("/").rpartition("/")[2] for found in store.ls(name, detail=False)}
        except FileNotFoundError:
            return set()


def remove(url: str) -> None:
    """Remove the file at `url`, if there is one."""
    with _asked(url) as (store, name):
        if store.exists(name):
            store.rm_file(name)


@contextmanager
def _asked(url: str) -> Iterator[tuple[Any, str]]:
    """The store and the name in it. Every store's client has exceptions of its own; all become one line."""
    try:
        yield _remote(url)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"{url}: {reason}; check the address and your credentials, then run it again") from error


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(path))
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install 'cloze[s3]' or 'cloze[gcs]' or 'cloze[http]'") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; name a path or a URL that fsspec understands") from error
