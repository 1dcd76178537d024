"""Values that came out of tables and JSON -> documents, for the sources that have fields."""

from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.sources.base import Bad, Document, InputFile, Span, origin
from data_prep.sources.files import decoded

NO_TEXT, EMPTY = "no_text_field", "empty"


def row_documents(file: InputFile, span: Span, rows: Iterable[tuple[int, Any]]) -> Iterator[Document | Bad]:
    """Each (number, value) of the text's column: a document, `EMPTY` for a null or a list of nothing, or `NO_TEXT`."""
    for number, value in rows:
        yield document(value, f"{file.path}, row {number}", origin(span.file, number))


def document(value: Any, location: str, number: int) -> Document | Bad:
    """The document that a field's value makes: a text, its bytes, or a list of paragraphs, each again such a value."""
    parts = [] if value is None else list(_paragraphs(value))
    if not parts:
        return Bad(EMPTY, location)
    if None in parts:
        return Bad(NO_TEXT, location)
    found = [decoded(part) if isinstance(part, bytes) else (str(part), False) for part in parts]
    return Document("\n\n".join(text for text, _ in found), location, number, any(repaired for _, repaired in found))


def _paragraphs(value: Any) -> Iterator[str | bytes | None]:
    """The texts in a value, nulls in lists left out; None for anything that is no text."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += [inner for inner in reversed(part) if inner is not None]
        else:
            yield part if isinstance(part, str | bytes) else None
