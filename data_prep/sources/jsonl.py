"""JSON: a document per object, one a line (JSON Lines), over several, side by side, or in an array."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from cloze.encodings import codec_of, to_utf_8
from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Span, origin
from data_prep.sources.files import FOREIGN, EncodedSource
from data_prep.sources.json_values import (
    HEAD_BYTES,
    MISSING,
    Value,
    at_path,
    parsed,
    stands_apart_from_lines,
    text_paths,
    values,
)
from data_prep.sources.lines import MAX_LINE_BYTES, Line, head
from data_prep.sources.rows import NO_TEXT, document


@dataclass(frozen=True, kw_only=True)
class JsonlSource(EncodedSource, kind="jsonl"):
    malformed: ClassVar[frozenset[str]] = FOREIGN | {"bad_json", NO_TEXT, "line_too_long"}

    paths: list[str] = doc("files, globs or URLs, .gz .zst .xz .bz2 as they are")
    field: str = doc("key of the text, dotted where it is nested: meta.content")

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """One, where no line begins a value for sure."""
        pieces = super().num_pieces(file, task_bytes)
        return 1 if pieces > 1 and self._apart_from_lines(file) else pieces

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The texts of the values that begin in the span."""
        found = self.lines(file, span)
        if isinstance(found, Bad):
            yield found
            return
        keys_told = False
        for value in values(found) if self._apart_from_lines(file) else _of_lines(found, span):
            known = span.begin == 0  # lines are counted from there
            location = f"{file.path}, line {value.line}" if known else f"{file.path}, byte {value.offset}"
            item, keys = self._document(value, location, origin(span.file, value.offset))
            if keys and not keys_told:
                item, keys_told = Bad(NO_TEXT, f"{location}: no text under {self.field}; {keys}"), True
            yield item

    def _apart_from_lines(self, file: InputFile) -> bool:
        start = head(file.path, HEAD_BYTES)
        return stands_apart_from_lines(to_utf_8(start, codec_of(start, self.encoding)))

    def _document(self, value: Value, location: str, number: int) -> tuple[Document | Bad, str]:
        """What a value makes, and what to do where it lacks the field."""
        if value.data is None:
            return Bad("line_too_long", location), ""
        try:
            content = parsed(value.data)
        except (ValueError, RecursionError):
            return Bad("bad_json", location), ""
        text = at_path(content, self.field)
        item = document(text if text is not MISSING else 0, location, number)
        if isinstance(item, Document):
            return item._replace(repaired=not _is_utf_8(value.data)), ""
        if isinstance(text, dict) and "0" in text:  # pandas' to_json() as it comes
            return item, "it holds a table by columns: write the table with to_json(orient='records')"
        paths = list(dict.fromkeys(text_paths(content)))[:12] if item.reason == NO_TEXT else []
        return item, f"set source.field to one of {', '.join(paths)}" if paths else ""


def _of_lines(found: Iterable[Line], span: Span) -> Iterator[Value]:
    """One value a line, or several where the end of a line was lost between them."""
    number = 0
    for place, offset, line, goes_on in found:
        number += not goes_on
        if goes_on or not line.strip():
            continue
        if place >= span.end:
            return
        if len(line) >= MAX_LINE_BYTES:
            yield Value(number, offset, None)
        elif line.count(b"}") > 1 and (b"}{" in line or b"} {" in line):  # to count one letter is ten times as fast
            several = list(values([(place, offset, line, False)]))
            broken = any(value.data is None or not value.data.endswith(b"}") for value in several)
            yield from [Value(number, offset, line)] if broken else (each._replace(line=number) for each in several)
        else:
            yield Value(number, offset, line)


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
