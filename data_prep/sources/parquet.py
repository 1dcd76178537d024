"""Parquet files: one document per row (cloze[parquet])."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Span
from data_prep.sources.files import FileSource
from data_prep.sources.rows import NO_TEXT, row_documents
from data_prep.sources.tables import parquet_rows, parquet_size


@dataclass(frozen=True, kw_only=True)
class ParquetSource(FileSource, kind="parquet"):
    malformed: ClassVar[frozenset[str]] = frozenset({NO_TEXT})
    library: ClassVar[str | None] = "pyarrow"

    field: str = doc("column of the text")

    def find_inputs(self) -> list[InputFile]:
        """The files; spans count their row groups."""
        return [file._replace(**parquet_size(file.path, self.field)._asdict()) for file in super().find_inputs()]

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The texts of the span's row groups."""
        return row_documents(file, span, parquet_rows(file.path, span.begin, span.end, self.field))
