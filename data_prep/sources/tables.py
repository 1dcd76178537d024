"""Rows of Parquet files (cloze[parquet]) and of Hugging Face data sets (cloze[hub]) -> texts. Both optional."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from cloze.errors import UserError
from cloze.storage import changed, open_input
from data_prep.sources.json_values import at_path

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?")
_TEXT_TYPES = ("string", "large_string", "binary", "large_binary", "fixed_size_binary")  # and string_view, binary_view
_LISTS = re.compile(  # of Parquet's own
    r"\.(?:list|bag)\.(?:element|item|array|array_element)(?=\.|$)|\.array(?=\.|$)|\.(?:key_value|map)(?=\.(?:key|value)\b)"
)
_SCRIPT = re.compile("script|trust_remote_code|[Ll]oading script")  # in what `datasets` says of a set that is code
_COPIES = {
    "wikipedia": "wikimedia/wikipedia@20231101.en"
}  # data sets known by a name that is a script, and their copies
_UNKNOWN_SHARD_BYTES = 64 * 2**20  # taken for the text of a shard whose size the hub does not tell


class Size(NamedTuple):
    units: int  # row groups of a file, shards of a data set: what a task can enter
    text_bytes: int


class DataSet(NamedTuple):
    rows: Any  # datasets.IterableDataset
    version: int  # changes with its files: their revision on the hub, or their times of modification


def parquet_size(path: str, field: str) -> Size:
    """Row groups, and bytes of the column `field`."""
    with open_input(path) as file:
        table, leaves = _parquet(path, file, field)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return Size(len(groups), sum(c.total_uncompressed_size for c in columns if c.path_in_schema in leaves))


def parquet_rows(path: str, begin: int, end: int, field: str) -> Iterator[tuple[int, Any]]:
    """(row number, value) of the column `field` in row groups `begin` to `end`, some hundred rows in memory.

    Values are bytes, lists of such (however deep), or None.
    """
    with open_input(path) as file:
        table, leaves = _parquet(path, file, field)
        row = sum(table.metadata.row_group(i).num_rows for i in range(begin))
        if begin == end:
            return
        with _told(path):
            for batch in table.iter_batches(batch_size=256, row_groups=list(range(begin, end)), columns=leaves):
                for value in _values(batch.column(0), field.split(".")[1:] if field not in batch.schema.names else []):
                    yield row, value
                    row += 1


def _parquet(path: str, file: Any, field: str) -> tuple[Any, list[str]]:
    """The open file, and what Parquet calls the leaves that make up the column `field`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("source=parquet: needs pyarrow: pip install 'cloze[parquet]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no Parquet file ({str(error).splitlines()[0]}); restore or leave it out") from error
    columns = dict(pair for column in table.schema_arrow for pair in _text_columns(column.name, column.type))
    if field not in columns:
        texts = [name for name, holds_text in columns.items() if holds_text]
        remedy = f"set source.field to one of {', '.join(texts)}" if texts else "no column of it holds text"
        raise UserError(f"{path}: has no column of text named {field}; {remedy}")
    metadata = table.metadata.schema
    paths = [metadata.column(i).path for i in range(len(metadata))]
    return table, [path for path in paths if field in (path, _LISTS.sub("", path))]


def _text_columns(name: str, kind: Any) -> Iterator[tuple[str, bool]]:
    """The dotted names of what can hold text in a column of this Arrow type, itself or members of it, and if it does.

    pandas writes a column without a single text as one of nulls, which have no other type.
    """
    from pyarrow import types

    while _is_list(kind) or types.is_dictionary(kind) or hasattr(kind, "storage_type"):
        kind = getattr(kind, "storage_type", None) or kind.value_type
    if types.is_struct(kind):
        for member in kind:
            yield from _text_columns(f"{name}.{member.name}", member.type)
    elif types.is_map(kind):
        yield from _text_columns(f"{name}.key", kind.key_type)
        yield from _text_columns(f"{name}.value", kind.item_type)
    elif str(kind).startswith(_TEXT_TYPES) or types.is_null(kind):
        yield name, not types.is_null(kind)


def _is_list(kind: Any) -> bool:
    return "list" in str(kind).partition("<")[0]  # list, large_list, fixed_size_list, list_view, large_list_view


def _values(array: Any, members: Sequence[str]) -> list[Any]:
    """The texts of an Arrow array as bytes, lists of them where it holds lists, and None for nulls.

    `members` lead through structs. pyarrow itself would give up at the first byte that is no UTF-8.
    """
    import pyarrow
    import pyarrow.compute  # not of itself there

    kind = array.type
    if hasattr(kind, "storage_type"):
        return _values(array.storage, members)
    if pyarrow.types.is_dictionary(kind):
        words = _values(array.dictionary, members)
        return [None if index is None else words[index] for index in array.indices.to_pylist()]
    if pyarrow.types.is_struct(kind):
        return _values(pyarrow.compute.struct_field(array, members[0]), members[1:])
    if _is_list(kind) or pyarrow.types.is_map(kind):
        lengths = pyarrow.compute.list_value_length(array).to_pylist()
        flat = iter(_values(array.flatten(), members))
        return [None if length is None else list(islice(flat, length)) for length in lengths]
    return list(array.cast(pyarrow.large_binary()).to_pylist())


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What pyarrow and datasets raise over damaged data, and over a network, has no common type: one line for all."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({first}); restore or leave out the file") from error


def hub_size(path: str) -> tuple[Size, int]:
    """Shards of the data set and its bytes as the hub tells them; and its version."""
    rows, version = _data_set(path)
    split = (rows.info.splits or {}).get(str(rows.split))
    size = int(split.num_bytes or 0) if split else _UNKNOWN_SHARD_BYTES * rows.num_shards
    return Size(rows.num_shards, size), version


def hub_rows(path: str, begin: int, end: int, field: str, version: int) -> Iterator[tuple[int, Any]]:
    """(place, value) of the column `field` of shards `begin` to `end`, streamed. Raises `UserError` if it changed."""
    rows, found = _data_set(path)
    if found != version:
        raise changed(path)
    total = rows.num_shards
    with _told(path):
        for shard in range(begin, end):
            for number, row in enumerate(rows.shard(num_shards=total, index=shard)):
                yield shard << 40 | number, at_path(row, field)


def _data_set(path: str) -> DataSet:
    """`name`, `name@config` or `name@config:split` (train unless given) of the hub, or a directory."""
    os.environ.setdefault("USE_TORCH", "0")  # not wanted here, and kept out of workers
    try:
        import datasets
    except ImportError:
        raise UserError("source=hub: needs datasets: pip install 'cloze[hub]'") from None
    match = _NAME.fullmatch(path)
    if not match:
        raise UserError(f"source.paths: {path}: not of the form name@config:split")
    try:
        builder = datasets.load_dataset_builder(match["name"], match["config"])
        rows = builder.as_streaming_dataset(split=match["split"] or "train")
        return DataSet(rows, int((builder.hash or "0")[:15], 16))
    except (OSError, ValueError, RuntimeError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        if _SCRIPT.search(str(error)):
            raise UserError(f"source.paths: {path}: is a script, and none is run; {_copy(match['name'])}") from error
        raise UserError(f"source.paths: {path}: {first}; correct the name") from error


def _copy(name: str) -> str:
    """What to do instead of running a data set's script: every public one has a copy in Parquet on the hub."""
    known = f"name its copy {_COPIES[name]}, or " if name in _COPIES else ""
    url = f"hf://datasets/{name}@~parquet/**/*.parquet"
    return f"""{known}take the Parquet files that the hub made of it: source=parquet 'source.paths=["{url}"]'"""
