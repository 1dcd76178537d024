"""What evaluations leave as JSON: an object a file, of a `format`, with the names that stand in it. Knows no models."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloze.errors import DiskError
from cloze.files import write_whole
from cloze.log import closing
from cloze.ownership import require_own_file

GRAMMAR, PROBES = "cloze-grammar", "cloze-probes"  # formats

# Of minimal pairs: columns, and rows of the group of all
WITHIN_WORD, FREQUENCIES, GAIN = "within_word_l2r", "frequencies", "gain"
OVERALL, AGREEMENT = "all", "agreement"


def refuse_foreign(out: str | None, kind: str) -> None:
    """Raises `UserError` where `out` is there and holds no results of this format."""
    if out is not None:
        require_own_file(Path(out), (f'"{kind}"',), "out=")


def write(out: str | None, body: Mapping[str, Any]) -> None:
    """The file, if one is asked for, and the command's last line. Raises `DiskError`."""
    if out is None:
        closing("scored; nothing is saved, out=FILE.json keeps it")
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(out), f"{json.dumps(body, indent=1, ensure_ascii=False)}\n".encode())
    except OSError as error:
        raise DiskError(f"out={out}: {error.strerror}; free space, or name another file") from error
    closing(f"scored; {out} has all digits")
