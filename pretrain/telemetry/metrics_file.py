"""A metrics.jsonl as it grows, in bounded memory: what a page and a list read of runs, live or finished, of any length.

Lines are taken once. Of a long file every second, fourth, eighth … row of training is kept, and rows of evaluations as
long as there are few of them; the newest row always. Knows nothing of what the metrics mean.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cloze.errors import UserError
from cloze.files import parsed

METRICS_NAME = "metrics.jsonl"
ROLLED_BACK_NAME = "metrics.rolled-back.jsonl"

_MOST_STEPS = 2**53
_LARGEST = 1e300
_MOST_ROWS = 6_000  # of training, and as many of evaluations
_BITE_BYTES = 1 << 23
_EVALUATION = b'"eval/'

_MARK_BYTES = 12  # of a row, `{"step": 123`: another run's would begin otherwise

Row = Mapping[str, Any]


class _Kept:
    """Every n-th row, n growing so that there are never more than `_MOST_ROWS`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Row]] = []  # with the numbers of their lines
        self._every, self._seen = 1, 0

    def offer(self, number: int, line: bytes) -> None:
        """The next line; it is parsed if it is kept."""
        self._seen += 1
        if (self._seen - 1) % self._every or (row := row_of(line)) is None:
            return
        self.rows.append((number, row))
        if len(self.rows) > _MOST_ROWS:
            self.rows, self._every = self.rows[::2], 2 * self._every


class MetricsFile:
    """The rows of one file, refreshed on demand. A half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._training, self._evaluations = _Kept(), _Kept()
        self._newest: Row | None = None
        self._at = self._number = 0  # where the newest row begins, which may yet be written anew; its line
        self._mark, self._identity = b"", (0, 0)

    def refresh(self) -> bool:
        """Read what has come since; whether something has. Raises `UserError` where it cannot be read."""
        before = self._at, self._newest
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                file.seek(self._at)
                if (found.st_dev, found.st_ino) != self._identity or file.read(_MARK_BYTES) != self._mark:
                    self._forget()  # another file, or one that goes on from an earlier step
                    self._identity = found.st_dev, found.st_ino
                file.seek(self._at)
                self._read(file)
        except (FileNotFoundError, NotADirectoryError):
            self._forget()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return before != (self._at, self._newest)

    def _read(self, file: BinaryIO) -> None:
        """From the newest row on."""
        at, pending, newest = self._at, b"", b""
        while bite := file.read(_BITE_BYTES):
            *lines, pending = (pending + bite).split(b"\n")
            for line in lines:
                if newest:
                    kept = self._evaluations if _EVALUATION in newest else self._training
                    kept.offer(self._number, newest)
                    self._number += 1
                    self._at = at
                newest = line
                at += len(line) + 1
        if newest:
            self._newest, self._mark = row_of(newest) or self._newest, newest[:_MARK_BYTES]

    @property
    def rows(self) -> list[Row]:
        """What is kept, in the order of the file."""
        kept = sorted([*self._training.rows, *self._evaluations.rows], key=lambda one: one[0])
        return [row for _, row in kept] + ([self._newest] if self._newest else [])


def newest_rows(path: Path, most_bytes: int = 1 << 18) -> list[Row]:
    """The last rows of a metrics file, as many as stand in its last `most_bytes`. [] where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, size - most_bytes))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = (row_of(line) for line in lines[1 if start else 0 :])
    return [row for row in rows if row is not None]


def row_of(line: str | bytes) -> Row | None:
    """The row in a line: its step, and of each name a finite number, or None; None where it is torn, or no row."""
    try:
        row = parsed(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < _MOST_STEPS:
        return None
    return {name: value for name, value in row.items() if value is None or is_number(value)}


def is_number(value: object) -> bool:
    """Whether it is one that can be counted, drawn and compared: of a file that anybody may have written."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST
