"""Plain text: documents between blank lines, or one per file."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import ClassVar

from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Span, origin
from data_prep.sources.files import FOREIGN, FileSource, decoded, text_lines

PART_BYTES = 4 * 2**20  # a longer text is handed on in parts


class DocumentBoundary(StrEnum):
    blank_line = auto()
    file = auto()


@dataclass(frozen=True, kw_only=True)
class TextSource(FileSource, kind="text"):
    malformed: ClassVar[frozenset[str]] = FOREIGN

    paths: list[str] = doc("files, globs or URLs, .gz .zst .xz .bz2 as they are")
    document: DocumentBoundary = doc("what separates documents: blank_line or file")

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """One, where the file is the document."""
        return 1 if self.document is DocumentBoundary.file else super().num_pieces(file, task_bytes)

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """Runs of lines between blank ones, or whole files. A document belongs to the span of the blank line before."""
        found = text_lines(file, span)
        if isinstance(found, Bad):
            yield found
            return
        by_blank_line = self.document is DocumentBoundary.blank_line
        part: list[bytes] = []
        part_bytes = start = 0
        inside = between = False  # inside a document that is ours; between two documents

        def document() -> Document:
            text, repaired = decoded(b"\n".join(part))
            return Document(text, f"{file.path}, byte {start}", origin(span.file, start), repaired)

        for place, offset, line, _ in found:
            if offset == 0:
                inside = between = place < span.end
            if by_blank_line and not line.strip():
                if part:
                    yield document()
                part, part_bytes = [], 0
                inside = between = place < span.end
                if not inside:
                    return
            elif inside:
                start, between = offset if between else start, False
                part.append(line)
                part_bytes += len(line)
                if part_bytes >= PART_BYTES:
                    yield document()
                    part, part_bytes = [], 0
        if part:
            yield document()
