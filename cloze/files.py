"""Files that are whole or not there."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that whoever reads it, also after a crash, finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")  # no other host's either
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, target: Path) -> Path:
    """Rename `source`, over a file that is there, and see that it was done; returns `target`. Raises OSError.

    A network file system may do it and lose its answer: asked again, it says that there is no `source`. Or it may say
    that it was done, and it was not.
    """
    known = source.lstat()
    try:
        source.replace(target)
    except FileNotFoundError:
        if not target.exists() or not os.path.samestat(target.lstat(), known):
            raise
    if source.exists() or not target.exists():
        raise OSError(errno.EIO, "its renaming was lost", str(target))
    return target


def parsed(text: str | bytes) -> Any:
    """As `json.loads`. Raises ValueError whatever is wrong: also of nesting so deep that Python gives up."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none that can be read, of which whoever needs it complains."""
    try:
        body = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
