"""Data sets of the Hugging Face hub, or directories of one, streamed (cloze[hub])."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Source, Span
from data_prep.sources.rows import NO_TEXT, row_documents
from data_prep.sources.tables import hub_rows, hub_size


@dataclass(frozen=True, kw_only=True)
class HubSource(Source, kind="hub"):
    malformed: ClassVar[frozenset[str]] = frozenset({NO_TEXT})
    library: ClassVar[str | None] = "datasets"

    paths: list[str] = doc("data sets: name, name@config or name@config:split (train unless given)")
    field: str = doc("column of the text")

    def find_inputs(self) -> list[InputFile]:
        """The data sets; spans count their shards."""
        return [
            InputFile(name, size.text_bytes, version, size.text_bytes, size.units)
            for name in dict.fromkeys(self.paths)
            for size, version in (hub_size(name),)
        ]

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The texts of the span's shards. Raises `UserError` for a data set that changed."""
        return row_documents(file, span, hub_rows(file.path, span.begin, span.end, self.field, file.version))
