"""Plain text: documents between blank lines or other separators, one a line, or one a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from typing import ClassVar

from cloze.log import log
from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Look, Span, origin
from data_prep.sources.files import FOREIGN, EncodedSource, decoded
from data_prep.text.layout import is_blank, judged, marked_up

PART_BYTES = 4 * 2**20  # a longer text is handed on in parts

_LARGE_DOCUMENT_BYTES = 16 * 2**20
_LARGE_SHARE = 0.1  # of a source's text
_LONGEST_BLANK = 64  # bytes of a line of white space


class DocumentBoundary(StrEnum):
    blank_line = auto()
    line = auto()
    file = auto()
    auto = "auto"  # decided by a sample, when the preparation is planned


@dataclass(frozen=True, kw_only=True)
class TextSource(EncodedSource, kind="text"):
    malformed: ClassVar[frozenset[str]] = FOREIGN

    paths: list[str] = doc("files, globs or URLs, .gz .zst .xz .bz2 as they are")
    document: DocumentBoundary = doc("what a document is: blank_line (between such lines), line, file; auto looks")
    separator: str | None = doc("the line that ends a document, where that is no blank one: --- or <|endoftext|>")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.separator is None or self.separator.strip() != "", "separator: empty; leave it out")
        self._require(
            self.separator is None or self.document in (DocumentBoundary.blank_line, DocumentBoundary.auto),
            f"separator={self.separator}: and document={self.document} is given, too; leave one of them out",
        )

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """One, where the file is the document."""
        return 1 if self.document is DocumentBoundary.file else super().num_pieces(file, task_bytes)

    def looked_at(self, files: Sequence[InputFile]) -> Look:
        """Decides what documents are, and whether lines are sentences, by how lines, blank ones and marks stand."""
        super().looked_at(files)
        samples = [[decoded(line)[0] for line in found] for _, found in self.sampled(files)]
        if ends := (self.separator or "").strip():
            samples = [["" if line.strip() == ends else line for line in lines if line.strip()] for lines in samples]
        layout = judged(samples)
        name = f"source.paths={self.paths[0]}{', …' if len(self.paths) > 1 else ''}"
        if markup := marked_up(samples):
            log.warning(f"{name}: {markup}")
        chosen = self
        if self.document is DocumentBoundary.auto and self.separator:
            chosen = replace(self, document=DocumentBoundary.blank_line)
        elif self.document is DocumentBoundary.auto:
            chosen = replace(self, document=DocumentBoundary(layout.document), separator=layout.separator)
            log.info(f"{name}: {layout.why}: source.document={layout.document}, sentences={layout.sentences}")
            if layout.advice:
                log.warning(f"{name}: {layout.advice}")
        if chosen.document is DocumentBoundary.file:
            _tell_of_large(files)
        return Look(chosen, layout.sentences)

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """Runs of lines (they belong to the span of the blank line, or separator, before), lines, or the file."""
        found = self.lines(file, span)
        if isinstance(found, Bad):
            yield found
            return
        by_line = self.document is DocumentBoundary.line
        by_blank_line = self.document is not DocumentBoundary.file  # also where `auto` was left undecided
        ends = (self.separator or "").strip().encode()  # a document
        part: list[bytes] = []
        part_bytes = start = 0
        inside = between = False  # inside a document that is ours; between two documents

        def document() -> Document:
            text, repaired = decoded(b"\n".join(part))
            return Document(text, f"{file.path}, byte {start}", origin(span.file, start), repaired)

        for place, offset, line, goes_on in found:
            if by_line:
                if place >= span.end:
                    return
                if not goes_on:
                    start = offset
                part = [line]
                if line.strip():
                    yield document()
                part = []
                continue
            if offset == 0:
                inside = between = place < span.end
            seen = line.strip()
            if by_blank_line and (seen == ends or (not ends and seen[-1:] > b"\x7f" and _is_blank(seen))):
                if part:
                    yield document()
                part, part_bytes = [], 0
                inside = between = place < span.end
                if not inside:
                    return
            elif inside and (part or not ends or seen):
                start, between = offset if between else start, False
                part.append(line)
                part_bytes += len(line)
                if part_bytes >= PART_BYTES:
                    yield document()
                    part, part_bytes = [], 0
        if part:
            yield document()


def _is_blank(line: bytes) -> bool:
    """Of a line that ASCII's white space does not make blank."""
    return len(line) <= _LONGEST_BLANK and is_blank(decoded(line)[0])


def _tell_of_large(files: Sequence[InputFile]) -> None:
    """A document makes no random pair with itself: one that is a large share of the text spoils the pairs."""
    total = sum(file.text_bytes for file in files)
    largest = max(files, key=lambda file: file.text_bytes)
    if largest.text_bytes > max(_LARGE_DOCUMENT_BYTES, _LARGE_SHARE * total):
        log.warning(
            f"{largest.path}: one document of {largest.text_bytes / 1e6:,.0f} MB, {largest.text_bytes / total:.0%} of "
            "the source: its pairs find few others to be random with; if it is several texts, set "
            "source.document=blank_line"
        )
