"""Rows whose columns have types: Parquet files and data sets of the hub. Numbered labels come under their names.

Both packages are optional: cloze[parquet], cloze[hub].
"""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from cloze.errors import UserError, first_line
from finetune.readers import Row, object_row

_Naming = Mapping[str, Callable[[int], str]]  # of columns with numbers: their names


def parquet_rows(data: bytes, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a Parquet file; `columns` are read, those like `data.text` in the structs within.

    Where `datasets` wrote it, its schema names the labels. Raises `UserError` for what is no such file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError("needs pyarrow: pip install 'cloze[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"no sound Parquet file ({first_line(error)}); write it again") from error
    told = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})
    one = {key: _numbered(kind["names"]) for key, kind in features.items() if kind.get("_type") == "ClassLabel"}
    lists = {key: kind.get("feature") for key, kind in features.items() if isinstance(kind, dict)}
    many = {
        key: _numbered(kind["names"])
        for key, kind in lists.items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    }
    return [object_row(f"row {number}", _named(_decoded(row), one, many), columns) for number, row in enumerate(rows)]


def hub_rows(source: str) -> list[Row]:
    """Rows of `hub:NAME@CONFIG:SPLIT`, or of a directory in the hub's format."""
    try:
        from datasets import ClassLabel, disable_progress_bars, load_dataset
    except ModuleNotFoundError:
        raise UserError("needs datasets: pip install 'cloze[hub]'") from None
    where, _, split = source.removeprefix("hub:").rpartition(":")
    where, _, subset = where.partition("@")
    if not where or not split:
        raise UserError("NAME and SPLIT are needed: hub:NAME:SPLIT, or hub:NAME@CONFIG:SPLIT")
    disable_progress_bars()
    try:
        data = load_dataset(where, subset or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # the last for a data set that is a script
        raise UserError(f"{first_line(error)}; name a file with data.train and data.dev") from error
    one = {key: kind.int2str for key, kind in data.features.items() if isinstance(kind, ClassLabel)}
    of_lists = {key: getattr(kind, "feature", None) for key, kind in data.features.items()}
    many = {key: kind.int2str for key, kind in of_lists.items() if isinstance(kind, ClassLabel)}
    return [Row(f"row {number}", _named(row, one, many)) for number, row in enumerate(data)]


def _numbered(names: list[str]) -> Callable[[int], str]:
    return lambda number: names[number]


def _named(row: dict[str, Any], one: _Naming, many: _Naming) -> dict[str, Any]:
    """The row with names for the numbers of these columns, and of those with lists; "-" for none, as GLUE's tests."""
    labels = {key: to_name(row[key]) if row[key] >= 0 else "-" for key, to_name in one.items() if row[key] is not None}
    tags = {key: [to_name(each) for each in row[key] or ()] for key, to_name in many.items()}
    return {**row, **labels, **tags}


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    """Spark and Hive write texts without saying that they are."""
    return {key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in row.items()}
