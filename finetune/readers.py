"""The text of a file as rows: tables and JSON. What cannot be read of a row is its fault, not the file's.

Knows no tasks; a family whose files look otherwise brings a reader of its own.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cloze.errors import UserError

Layout = tuple[str, ...]  # columns: the text, perhaps a second text, the label

_PACKED = re.compile(r"\.(gz|zst|bz2|xz)$")


class Row(NamedTuple):
    """One line, item or question of a file."""

    place: str  # "line 3", for messages
    columns: dict[str, Any]
    fault: str | None = None  # why it cannot be used


class Columns(NamedTuple):
    """What is known of a file's columns before it is read."""

    named: Sequence[str] | None = None  # by data.columns
    of_task: Sequence[Layout] = ()  # those that its files may have; the first whose columns are all there
    default_header: Layout | None = None  # of a file without a header

    @property
    def layouts(self) -> Sequence[Layout]:
        """The columns to read: those that are named, or the task's."""
        return (tuple(self.named),) if self.named else self.of_task

    def of(self, row: Row) -> Layout | None:
        """The first layout whose columns a row has; None where it has none."""
        return next((names for names in self.layouts if {*names} <= row.columns.keys()), None)


def suffix(path: str) -> str:
    """`.csv` of `TRAIN.CSV.gz`."""
    return "." + _PACKED.sub("", path.lower()).rpartition(".")[2]


def read_rows(text: str, path: str, columns: Columns) -> list[Row]:
    """JSON by its suffix, else a table. Raises `UserError` for a file that is neither."""
    if suffix(path) in (".jsonl", ".json"):
        return json_rows(text)
    return table_rows(text, columns.default_header, columns.layouts, quoted=suffix(path) == ".csv")


def json_rows(text: str) -> list[Row]:
    """Objects, one to a line, or all of them in one array."""
    if text.lstrip().startswith("["):
        try:
            items = [(f"item {number}", item) for number, item in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise UserError(f"not JSON ({error}); an array of objects, or an object on each line, is needed") from None
        return [_object_row(place, item) for place, item in items]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\ufeff \t\r"):
            try:
                rows.append(_object_row(f"line {number}", json.loads(line.lstrip("\ufeff"))))
            except ValueError as error:
                rows.append(Row(f"line {number}", {}, f"not JSON ({error})"))
    return rows


def _object_row(place: str, item: Any) -> Row:
    return Row(place, item) if isinstance(item, dict) else Row(place, {}, "not a JSON object")


def table_rows(
    text: str, default_header: Sequence[str] | None, layouts: Sequence[Sequence[str]], *, quoted: bool
) -> list[Row]:
    """CSV as Python's csv module reads it; in TSV a quotation mark is text, as in GLUE's files.

    A file whose first line has none of the `layouts` may be one without a header: then it has the default one, or
    where the layout is of numbers its columns are named 1, 2, …
    """
    if quoted:
        lines = list(_csv_lines(text))
    else:
        lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    header, is_there = table_header(lines[0][1], default_header, layouts)
    lines = lines[1:] if is_there else lines
    rows = []
    for number, cells in lines:
        short = len(cells) != len(header)
        fault = f"{len(cells)} columns where the header has {len(header)}" if short else None
        rows.append(Row(f"line {number}", {} if short else dict(zip(header, cells, strict=True)), fault))
    return rows


def table_header(
    cells: Sequence[str], default: Sequence[str] | None, layouts: Sequence[Sequence[str]]
) -> tuple[list[str], bool]:
    """The names of a table's columns, and whether they stand in its first line, which has these `cells`."""
    names = [name.strip() for name in cells]
    known = any({*layout} <= {*names} for layout in layouts)
    if not known and any(all(name.isdecimal() for name in layout) for layout in layouts):
        return [str(number) for number in range(1, len(names) + 1)], False
    if default and len(names) == len(default) and not known:
        return list(default), False
    return names, True


def delimiter(header: str) -> str:
    """What stands between the columns of a CSV file, as its first line shows."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(",;\t", key=bare.count)  # of equals the comma


def _csv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the module's own is 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter(text.partition("\n")[0]))
    try:
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"line {reader.line_num}: {error}; mend it") from None
