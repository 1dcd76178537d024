"""Input files wherever they lie: a local path, or a URL that fsspec understands (s3://, gs://, https://, memory://)."""

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from data_prep.errors import UserError


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    bytes: int
    version: int  # modification time in ns, or a hash of what the store says of the object


def is_remote(path: str) -> bool:
    return "://" in path


def open_input(path: str) -> BinaryIO:
    """The file to read, as bytes; it can seek."""
    if not is_remote(path):
        return Path(path).open("rb")
    file_system, name = _remote(path)
    return cast(BinaryIO, file_system.open(name, "rb"))


def stamp(path: str) -> Stamp:
    """Size and version. Raises `OSError` where there is no such file."""
    if not is_remote(path):
        stat = Path(path).stat()
        return Stamp(stat.st_size, stat.st_mtime_ns)
    file_system, name = _remote(path)
    size = file_system.info(name).get("size")
    if size is None:
        raise OSError(f"{path}: the server does not tell its size")
    return Stamp(int(size), int(file_system.ukey(name)[:15], 16))


def remote_matches(pattern: str) -> list[str]:
    """The files that a URL or a URL with wildcards names, sorted; none if there is none."""
    file_system, name = _remote(pattern)
    protocol = pattern.partition("://")[0]
    found = sorted(file_system.glob(name)) if any(mark in name for mark in "*?[") else [name]
    return [f"{protocol}://{str(each).partition('://')[2] or each}" for each in found if file_system.isfile(each)]


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(path))
    except ImportError as error:
        raise UserError(f"{path}: {error}; pip install 'cloze[s3]' or 'cloze[gcs]' or 'cloze[http]'") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; name a path or a URL that fsspec understands") from error
