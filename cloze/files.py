"""Files that are whole or not there."""

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
    temporary.replace(path)


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
