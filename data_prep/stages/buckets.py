"""Intermediate files: rows of a table on their way from the tasks of one stage to those of another.

One file per task, in segments (one per flush, which bounds memory), each segment with its rows sorted by bucket, so
that a task finds its share in one run per column. Nothing outlives the preparation: no version, no checksum, and a file
that is there is whole, since it was renamed into place.

Shapes: D documents (rows, of any table), S their sentences, T their tokens, all one after another; B buckets.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cloze.corpus.ragged import Ints, offsets

_FLUSH_VALUES = 4_000_000  # of the longest column

Rows = TypeVar("Rows", bound=tuple[Any, ...])


class Column(NamedTuple):
    dtype: npt.DTypeLike
    width: int = 1  # values of each entry; an array [entries, width] if more than one
    level: int = 0  # 0: an entry per row; 1: several per row; 2: several for each of those
    counts: bool = False  # an entry says how many entries of the next level belong to it


@dataclass(frozen=True)
class Table(Generic[Rows]):
    """What the rows consist of: `make` is a named tuple of arrays, in the order of `columns`."""

    make: Callable[..., Rows]
    columns: tuple[Column, ...]

    def select(self, rows: Rows, order_D: Ints) -> Rows:
        """The rows at `order_D`, in that order."""
        bounds = self.bounds(rows)

        def selected(column: Column, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            if not column.level:
                return values[order_D]
            if not len(values):
                return values
            begins, ends = bounds[column.level][order_D].tolist(), bounds[column.level][order_D + 1].tolist()
            # Slices: indices take ten times the values' memory.
            return np.concatenate([values[:0], *map(values.__getitem__, map(slice, begins, ends))])

        return self.make(*map(selected, self.columns, rows))

    def concatenate(self, parts: Sequence[Rows]) -> Rows:
        """All rows of at least one part, in order."""
        return self.make(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def bounds(self, rows: Rows) -> list[Ints]:
        """For each level, the entry with which each row begins, and how many there are: [rows + 1]."""
        found = [np.arange(len(rows[0]) + 1)]
        for column, values in zip(self.columns, rows, strict=True):
            if column.counts:
                found.append(offsets(values)[found[-1]])
        return found

    def empty(self) -> Rows:
        """No rows."""
        return self.make(*(_shaped(column, np.zeros(0, column.dtype)) for column in self.columns))


class Documents(NamedTuple):
    """Encoded documents."""

    digests_Dx2: npt.NDArray[np.uint64]  # 128-bit hash of the text
    origins_D: npt.NDArray[np.uint64]  # equal for the parts of one long document
    sources_D: npt.NDArray[np.uint16]
    sentences_D: npt.NDArray[np.uint32]
    lengths_S: npt.NDArray[np.uint16]  # tokens per sentence
    tokens_T: npt.NDArray[np.unsignedinteger]  # u16 or u32
    starts_T: npt.NDArray[np.bool_]  # tokens that begin a word; empty where masking need not know


def documents_table(token_dtype: npt.DTypeLike) -> Table[Documents]:
    """Documents whose tokens are of this dtype."""
    return Table(
        Documents,
        (
            Column("<u8", width=2),
            Column("<u8"),
            Column("<u2"),
            Column("<u4", counts=True),
            Column("<u2", level=1, counts=True),
            Column(token_dtype, level=2),
            Column("?", level=2),
        ),
    )


class Digests(NamedTuple):
    """Documents of which only the text's hash travels: those that the bucket it leads to must not keep."""

    digests_Dx2: npt.NDArray[np.uint64]


DIGESTS = Table(Digests, (Column("<u8", width=2),))


class BucketWriter(Generic[Rows]):
    """Writes one intermediate file."""

    def __init__(self, file: BinaryIO, table: Table[Rows], num_buckets: int) -> None:
        self._file = file
        self._table = table
        self._num_buckets = num_buckets
        self._parts: list[Rows] = []
        self._buckets: list[Ints] = []
        self._num_values = 0
        self._segments: list[dict[str, Any]] = []

    def add(self, rows: Rows, bucket_D: Ints) -> None:
        """Rows, and the bucket of each."""
        self._parts.append(rows)
        self._buckets.append(bucket_D)
        self._num_values += max(values.size for values in rows)
        if self._num_values >= _FLUSH_VALUES:
            self._flush()

    def finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Write what is left, and `facts` (JSON) for `read_facts`."""
        if self._parts:
            self._flush()
        end = self._file.tell()
        self._file.write(json.dumps({"segments": self._segments, "facts": facts or {}}).encode())
        self._file.write(end.to_bytes(8, "little"))

    def _flush(self) -> None:
        bucket_D = np.concatenate(self._buckets)
        order_D = np.argsort(bucket_D, kind="stable")
        rows = self._table.select(self._table.concatenate(self._parts), order_D)
        first_B = np.searchsorted(bucket_D[order_D], np.arange(self._num_buckets + 1))
        borders = np.stack([bounds[first_B] for bounds in self._table.bounds(rows)], axis=1)  # [B + 1, levels]
        self._file.write(bytes(-self._file.tell() % 8))
        self._segments.append({"place": self._file.tell(), "entries": [len(values) for values in rows]})
        for array in (borders, *rows):
            self._file.write(array.tobytes())
        self._parts, self._buckets, self._num_values = [], [], 0


def read_facts(path: Path) -> dict[str, Any]:
    """What `finish` was given."""
    facts = _trailer(np.memmap(path, np.uint8, "r"))["facts"]
    assert isinstance(facts, dict)
    return facts


def read_bucket(table: Table[Rows], paths: Iterable[Path], bucket: int, num_buckets: int) -> Iterator[Rows]:
    """The rows of one bucket, intermediate file by intermediate file; the first part is empty."""
    empty = table.empty()
    yield empty
    levels = len(table.bounds(empty))
    for path in paths:
        data = np.memmap(path, np.uint8, "r")
        for segment in _trailer(data)["segments"]:
            place = segment["place"]
            end = place + (num_buckets + 1) * levels * 8
            borders = data[place:end].view(np.int64).reshape(-1, levels)
            begins, ends = borders[bucket].tolist(), borders[bucket + 1].tolist()
            if begins[0] == ends[0]:
                continue
            found, place = [], end
            for column, entries in zip(table.columns, segment["entries"], strict=True):
                size = np.dtype(column.dtype).itemsize * column.width
                begin, end = (begins[column.level], ends[column.level]) if entries else (0, 0)
                run = data[place + begin * size : place + end * size]
                found.append(_shaped(column, np.frombuffer(run.tobytes(), column.dtype)))
                place += entries * size
            yield table.make(*found)


def _shaped(column: Column, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.reshape(-1, column.width) if column.width > 1 else values


def _trailer(data: npt.NDArray[np.uint8]) -> dict[str, Any]:
    start = int.from_bytes(data[-8:].tobytes(), "little")
    trailer = json.loads(data[start:-8].tobytes())
    assert isinstance(trailer, dict)
    return trailer
