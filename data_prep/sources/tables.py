"""Rows of Parquet files (cloze[parquet]) and of Hugging Face data sets (cloze[hub]) -> texts. Both optional."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cloze.errors import UserError
from cloze.storage import changed, open_input

_NAME = re.compile(r"(?P<name>[^@:]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?")
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
        metadata = _parquet(path, file, field).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return Size(len(groups), sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field))


def parquet_rows(path: str, begin: int, end: int, field: str) -> Iterator[tuple[int, Any]]:
    """(row number, value) of the column `field` in row groups `begin` to `end`, some hundred rows in memory."""
    with open_input(path) as file:
        table = _parquet(path, file, field)
        row = sum(table.metadata.row_group(i).num_rows for i in range(begin))
        if begin == end:
            return
        with _told(path):
            for batch in table.iter_batches(batch_size=256, row_groups=list(range(begin, end)), columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield row, value
                    row += 1


def _parquet(path: str, file: Any, field: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("source=parquet: needs pyarrow: pip install 'cloze[parquet]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: no Parquet file ({str(error).splitlines()[0]}); restore or leave it out") from error
    plain = (pyarrow.string(), pyarrow.large_string())
    texts = [c.name for c in table.schema_arrow if c.type in plain or pyarrow.types.is_dictionary(c.type)]
    if field not in texts:
        raise UserError(f"{path}: has no column of text named {field}; set source.field to one of {', '.join(texts)}")
    return table


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
                yield shard << 40 | number, row.get(field)


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
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"source.paths: {path}: {first}; correct the name") from error
