"""Predictions on disk: rows in the format that the file's name tells, and a part file that a killed run goes on with.

What is done stands in `OUT.part`; `OUT.part.json` says how many of its bytes count, of how many rows they are, and what
made them. Only the whole file is called OUT. A file that is there already, or a part that is not ours, stays.
"""

import csv
import fcntl
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.errors import DiskError, UserError
from cloze.files import write_whole
from cloze.ownership import require_own_file
from finetune.readers import Row, suffix
from finetune.tasks import Task

_SUFFIXES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "json", ".txt": "text", ".conll": "conll"}
FORMATS = (*_SUFFIXES.values(), "glue", "squad")

_KIND = '{"kind": "predictions"'  # how a mark begins
_COMMENTS = "comments"  # the column of CoNLL's


@dataclass(frozen=True, kw_only=True)
class Table:
    """What rows become: text before the first, between two and after the last, and of each row and its answer."""

    row: Callable[[int, Row, Mapping[str, Any]], str]  # of its number in the file, from 0
    head: str = ""
    between: str = ""
    tail: str = ""


def format_of(path: str, asked: str | None) -> str:
    """`csv` of `B.csv.gz`, unless another one is asked for. Raises `UserError` where the file cannot be written so."""
    if asked is None and suffix(path) not in _SUFFIXES:
        raise UserError(f"out={path}: its name tells no format; add format={'|'.join(FORMATS)}")
    if path.lower().endswith((".zst", ".xz", ".bz2")):
        raise UserError(f"out={path}: is written plain or as .gz; name such a file")
    return asked or _SUFFIXES[suffix(path)]


def table(kind: str, columns: Sequence[str], adds: Sequence[str], task: Task | None) -> Table:
    """Of a format. `columns` are those of the first row, `adds` those of the answers, the answer itself first.

    Raises `UserError` where the task has no such format.
    """
    if kind in ("jsonl", "json"):
        is_array = kind == "json"
        return Table(
            row=lambda _, row, answer: (
                json.dumps({**row.columns, **answer}, ensure_ascii=False) + "\n" * (not is_array)
            ),
            **({"head": "[\n", "between": ",\n", "tail": "\n]\n"} if is_array else {}),
        )
    if kind in ("tsv", "csv"):
        return _cells(kind, columns, adds)
    if kind == "text":
        return Table(row=lambda _, row, answer: _line(answer[adds[0]]) + "\n")
    if kind == "conll":
        if "words" not in columns:
            raise UserError("format=conll: is of words and tags; name a .jsonl file")
        return Table(row=lambda _, row, answer: _conll(row, answer[adds[0]]))
    if kind == "squad":
        return Table(
            row=lambda number, row, answer: json.dumps(str(row.columns.get("id", number)))
            + ": " + json.dumps(answer[adds[0]], ensure_ascii=False),
            head="{\n", between=",\n", tail="\n}\n",
        )  # fmt: skip
    return _glue(task, adds[0])


def _cells(kind: str, columns: Sequence[str], adds: Sequence[str]) -> Table:
    names = [*columns, *adds]

    def values(_: int, row: Row, answer: Mapping[str, Any]) -> str:
        if more := next((name for name in row.columns if name not in columns), None):
            raise UserError(f"{row.place}: has {more}, which the first row lacks; name a .jsonl file")
        own = {**row.columns, **answer}
        return joined([_cell(own.get(name)) for name in names])

    def joined(cells: Sequence[str]) -> str:
        if kind == "tsv":
            return "\t".join(map(_line, cells)) + "\n"
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    return Table(head=joined(names), row=values)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _line(value: Any) -> str:
    """Without what would end a cell or a line, which a format without quotes cannot hold."""
    return _cell(value).replace("\t", " ").replace("\r", " ").replace("\n", " ")


def _conll(row: Row, tags: Sequence[str]) -> str:
    """The columns in their order, and then the tag."""
    own = [column for name, column in row.columns.items() if name != _COMMENTS]
    lines = ["\t".join(map(str, cells)) for cells in zip(*own, tags, strict=True)]
    return "\n".join([*row.columns.get(_COMMENTS, ()), *lines, "", ""])


def _glue(task: Task | None, name: str) -> Table:
    """GLUE's submission files: an index and a label as GLUE's server spells it."""
    if task is None or task.suite != "glue":
        raise UserError("format=glue: the model is of none of GLUE's tasks; add task=sst2, say, if it is")

    def label(prediction: Any) -> str:
        if task.label_range:
            low, high = task.label_range
            return f"{min(max(prediction, low), high):.3f}"
        if prediction not in task.labels:
            raise UserError(f"format=glue: {prediction!r} is no label of the task, whose are {', '.join(task.labels)}")
        return prediction if task.submits_names else str(task.labels.index(prediction))

    def row(number: int, row: Row, answer: Mapping[str, Any]) -> str:
        index = next((row.columns[name] for name in ("index", "idx") if name in row.columns), number)
        return f"{index}\t{label(answer[name])}\n"

    return Table(head="index\tprediction\n", row=row)


class Part:
    """`OUT.part` while it grows; `finish` makes it OUT. `num_rows` and `notes` go on from where a killed run was.

    `made_by` is what its bytes depend on: a part of something else is refused. Raises `UserError` where OUT is there or
    another process writes it, `DiskError` where the disk fails.
    """

    def __init__(self, out: Path, made_by: Mapping[str, Any]) -> None:
        self._out, self._made_by = out, dict(made_by)
        self._part, self._mark = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.part.json")
        self._bytes = 0
        self.num_rows = 0
        self.notes: dict[str, list[Any]] = {}  # what is to be told of some rows: of how many, and where the first is
        with _writing(out):
            self._refuse_occupied()
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("ab")
        try:
            with _writing(out):
                self._lock()
                self._go_on()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        if not self.num_rows:
            with _writing(self._out):
                self._part.unlink(missing_ok=True)
                self._mark.unlink(missing_ok=True)
        self._file.close()

    def note(self, what: str, places: Sequence[str]) -> None:
        """Count rows with this peculiarity; saved with the next `append`."""
        if places:
            count, first = self.notes.get(what, [0, places[0]])
            self.notes[what] = [count + len(places), first]

    def append(self, text: str, num_rows: int) -> None:
        """Text of so many more rows: once this returns, a killed run goes on behind it."""
        with _writing(self._out):
            self._bytes += self._write(text)
            self.num_rows += num_rows
            self._save()

    def _write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")  # halves of surrogate pairs, as JSON spells them
        data = gzip.compress(data, mtime=0) if data and self._out.suffix.lower() == ".gz" else data
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(data)

    def finish(self, tail: str = "") -> None:
        """With its last text the part becomes OUT; a run that is killed before that writes the tail again."""
        with _writing(self._out):
            self._write(tail)
            self._refuse_occupied()
            self._part.rename(self._out)
            self._mark.unlink()

    def _refuse_occupied(self) -> None:
        if self._out.exists():
            raise UserError(f"out={self._out}: is there already; name another file, or move it away")
        if not (at := next(path for path in self._out.parents if path.exists())).is_dir():
            raise UserError(f"out={self._out}: {at} is a file; name another file")
        require_own_file(self._mark, (_KIND,))
        if self._part.exists() and self._part.stat().st_size and not self._mark.exists():
            raise UserError(f"{self._part}: is there, and not one that Cloze wrote; name another file, or move it away")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(self._file.fileno()), self._part.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False  # another process writes it, or has renamed it since we opened it
        if not is_ours:
            raise UserError(f"out={self._out}: another process is writing it; let it end")

    def _go_on(self) -> None:
        if self._mark.exists():
            before = json.loads(self._mark.read_bytes())
            then = before["made_by"]
            other = sorted(key for key in then.keys() | self._made_by.keys() if then.get(key) != self._made_by.get(key))
            if other and self._part.stat().st_size:
                raise UserError(
                    f"{self._part}: was begun with another {', '.join(other)}; remove it and its .json, or name "
                    "another file"
                )
            if not other and self._part.stat().st_size >= before["bytes"]:
                self._bytes, self.num_rows, self.notes = before["bytes"], before["rows"], before["notes"]
        self._file.truncate(self._bytes)
        self._save()

    def _save(self) -> None:
        body = {"rows": self.num_rows, "bytes": self._bytes, "notes": self.notes, "made_by": self._made_by}
        write_whole(self._mark, f"{_KIND}, {json.dumps(body)[1:]}\n".encode())


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"out={out}: {error}; free space and run the same command again") from error
