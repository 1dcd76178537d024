"""The text of a file as rows: tables and JSON. What cannot be read of a row is its fault, not the file's.

Knows no tasks; a family whose files look otherwise brings a reader of its own.
"""

import csv
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cloze.errors import UserError

Layout = tuple[str, ...]  # columns: the text, perhaps a second text, the label

_PACKED = re.compile(r"\.(gz|zst|bz2|xz|zip)$")
_DECODER, _BETWEEN = json.JSONDecoder(), {*" \t\r\n,\ufeff"}  # objects


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
    if is_json(path):
        return json_rows(text, columns.named or ())
    quoted = suffix(path) == ".csv" or _is_csv_by_another_name(text.partition("\n")[0], columns.layouts)
    return table_rows(text, columns.default_header, columns.layouts, quoted=quoted)


def _is_csv_by_another_name(header: str, layouts: Sequence[Layout]) -> bool:
    """Whether the columns that are looked for stand in a header without tabs, apart by something else."""
    names = {name.strip(' "') for name in header.split(delimiter(header))}
    return "\t" not in header and any(len(layout) > 1 and {*layout} <= names for layout in layouts)


def is_json(path: str) -> bool:
    return suffix(path) in (".jsonl", ".json", ".ndjson")


def json_rows(text: str, named: Sequence[str] = ()) -> list[Row]:
    """Objects, one to a line, or over several lines, or all of them in one array, perhaps under a key of their own.

    `named`: columns that are read; those like `data.text` are looked for in the objects within.
    """
    try:
        if (items := _items(text)) is not None:
            return [object_row(f"item {number}", item, named) for number, item in enumerate(items, 1)]
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); an array of objects, or an object on each line, is needed") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\ufeff \t\r"):
            try:
                rows.append(object_row(f"line {number}", json.loads(line.lstrip("\ufeff")), named))
            except (ValueError, RecursionError) as error:
                rows.append(Row(f"line {number}", {}, f"not JSON ({error})"))
    return rows


def _items(text: str) -> list[Any] | None:
    """The values of a file that has them in an array, side by side, over several lines; None where lines hold them."""
    bare = text.strip("\ufeff \t\r\n")
    if bare.startswith("["):
        return list(json.loads(bare))
    try:
        first, end = _DECODER.raw_decode(bare)
    except (ValueError, RecursionError):
        return None  # lines tell which of them is broken
    if end == len(bare) and isinstance(first, dict) and isinstance(first.get("data"), list):
        return list(first["data"])
    if "\n" not in bare[:end] and not bare[end:].partition("\n")[0].strip():
        return None
    found, place = [], 0
    while place < len(bare):
        value, place = _DECODER.raw_decode(bare, place)
        found.append(value)
        while bare[place : place + 1] in _BETWEEN:
            place += 1
    return found


def object_row(place: str, item: Any, named: Sequence[str] = ()) -> Row:
    """A JSON object as a row; `named` columns may lie in objects within it."""
    if not isinstance(item, dict):
        return Row(place, {}, "not a JSON object")
    item = {name: _sound(value) for name, value in item.items()}
    return Row(place, {**item, **{name: found for name in named if (found := _within(item, name)) is not None}})


def _sound(value: Any) -> Any:
    """Without halves of surrogate pairs, which JSON may hold and no tokenizer takes, and without NaN for a gap."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_sound(one) for one in value]
    if isinstance(value, dict):
        return {name: _sound(one) for name, one in value.items()}
    return None if isinstance(value, float) and value != value else value


def _within(item: Any, name: str) -> Any:
    """What stands at a dotted name; None where nothing does."""
    if isinstance(item, dict) and name in item:
        return item[name]
    head, dot, rest = name.partition(".")
    return _within(item.get(head), rest) if dot and isinstance(item, dict) else None


def table_rows(
    text: str, default_header: Sequence[str] | None, layouts: Sequence[Sequence[str]], *, quoted: bool
) -> list[Row]:
    """CSV as Python's csv module reads it; in TSV a quotation mark is text, as in GLUE's files.

    A file whose first line has none of the `layouts` may be one without a header: then it has the default one, or
    where the layout is of numbers its columns are named 1, 2, …
    """
    if quoted:
        csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the module's own is 131,072 characters
        lines = [one for one in csv_cells(text.split("\n"), delimiter(text.partition("\n")[0])) if one[1]]
    else:
        lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    header, is_there = table_header(lines[0][1], default_header, layouts)
    refuse_twins(header, {name for layout in layouts for name in layout})
    return [_table_row(f"line {number}", cells, header) for number, cells in lines[int(is_there) :]]


def _table_row(place: str, cells: Sequence[str], header: Sequence[str]) -> Row:
    while len(cells) > len(header) and not cells[-1].strip():  # as spreadsheets write them
        cells = cells[:-1]
    if len(cells) != len(header):
        return Row(place, {}, f"{len(cells)} columns where the header has {len(header)}")
    if [cell.strip() for cell in cells] == [*header]:  # of files that were put one behind the other
        return Row(place, {}, "the header once more")
    return Row(place, dict(zip(header, cells, strict=True)))


def refuse_twins(header: Sequence[str], read: Collection[str] | None = None) -> None:
    """Raises `UserError` where two columns, of those that are `read`, have one name."""
    if twice := next((name for name in header if header.count(name) > 1 and (read is None or name in read)), None):
        raise UserError(f"line 1: two columns are called {twice!r}; rename one")


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
    return max(",;\t|", key=bare.count)  # of equals the comma


def csv_cells(found: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, cells) of each record of lines of CSV; a quoted cell may go over several.

    A quotation mark that is closed nowhere, or in the middle of a cell, costs its own line and none of those behind it.
    """
    numbered, again, own = enumerate(found, 1), deque[tuple[int, str]](), list[tuple[int, str]]()

    def taken() -> Iterator[str]:
        while (one := again.popleft() if again else next(numbered, None)) is not None:
            own.append(one)
            yield f"{one[1]}\n"

    while True:
        try:
            for cells in csv.reader(taken(), delimiter=separator, strict=True):
                yield own[-1][0], cells
                own.clear()
            return
        except csv.Error:
            (number, line), *behind = own
            again.extendleft(reversed(behind))
            own.clear()
        try:
            yield number, next(csv.reader([line.replace("\r", " ")], delimiter=separator))
        except csv.Error as error:
            raise UserError(f"line {number}: {error}; mend it") from None
