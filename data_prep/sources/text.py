"""Plain text: documents between blank lines, one a line, or one a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from typing import ClassVar

from cloze.log import log
from cloze.schema import doc
from data_prep.sources.base import Bad, Document, InputFile, Look, Span, origin
from data_prep.sources.files import FOREIGN, EncodedSource, decoded
from data_prep.text.layout import judged

PART_BYTES = 4 * 2**20  # a longer text is handed on in parts

_LARGE_DOCUMENT_BYTES = 16 * 2**20
_LARGE_SHARE = 0.1  # of a source's text


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

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """One, where the file is the document."""
        return 1 if self.document is DocumentBoundary.file else super().num_pieces(file, task_bytes)

    def looked_at(self, files: Sequence[InputFile]) -> Look:
        """Decides what documents are, and whether lines are sentences, by how lines, blank ones and marks stand."""
        super().looked_at(files)
        samples = [[decoded(line)[0] for line in found] for _, found in self.sampled(files)]
        layout = judged(samples)
        name = f"source.paths={self.paths[0]}{', …' if len(self.paths) > 1 else ''}"
        chosen = self
        if self.document is DocumentBoundary.auto:
            chosen = replace(self, document=DocumentBoundary(layout.document))
            log.info(f"{name}: {layout.why}: source.document={layout.document}, sentences={layout.sentences}")
            if layout.advice:
                log.warning(f"{name}: {layout.advice}")
        if chosen.document is DocumentBoundary.file:
            _tell_of_large(files)
        return Look(chosen, layout.sentences)

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """Runs of lines (they belong to the span of the blank line before), lines, or the file."""
        found = self.lines(file, span)
        if isinstance(found, Bad):
            yield found
            return
        by_line = self.document is DocumentBoundary.line
        by_blank_line = self.document is not DocumentBoundary.file  # also where `auto` was left undecided
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
