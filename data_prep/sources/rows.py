"""Rows of a table -> documents, for the sources that have rows."""

from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.sources.base import Bad, Document, InputFile, Span, origin

NO_TEXT = "no_text_field"


def row_documents(file: InputFile, span: Span, rows: Iterable[tuple[int, Any]]) -> Iterator[Document | Bad]:
    """Each (number, value) of the text's column: a document, or `NO_TEXT` where the value is none."""
    for number, value in rows:
        location = f"{file.path}, row {number}"
        if isinstance(value, str):
            yield Document(value, location, origin(span.file, number), False)
        else:
            yield Bad(NO_TEXT, location)
