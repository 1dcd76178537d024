"""JSON Lines: one object per line, one document per object."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Span, origin
from data_prep.sources.files import FOREIGN, FileSource, decoded, text_lines
from data_prep.sources.lines import MAX_LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class JsonlSource(FileSource, kind="jsonl"):
    malformed: ClassVar[frozenset[str]] = FOREIGN | {"bad_json", "no_text_field", "line_too_long"}

    paths: list[str] = doc("files, globs or URLs, .gz .zst .xz .bz2 as they are")
    field: str = doc("key of the text")

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The texts of the lines that begin in the span."""
        found = text_lines(file, span)
        if isinstance(found, Bad):
            yield found
            return
        for place, offset, line, goes_on in found:
            if goes_on or not line.strip():
                continue
            if place >= span.end:
                return
            location = f"{file.path}, byte {offset}"
            if len(line) >= MAX_LINE_BYTES:
                yield Bad("line_too_long", location)
                continue
            text, repaired = decoded(line)
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                yield Bad("bad_json", location)
                continue
            content = value.get(self.field) if isinstance(value, dict) else None
            if isinstance(content, str):
                yield Document(content, location, origin(span.file, offset), repaired)
            else:
                yield Bad("no_text_field", location)
