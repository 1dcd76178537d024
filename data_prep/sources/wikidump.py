"""MediaWiki dumps: one document per article, without markup (cloze[wiki])."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_prep.sources.base import Bad, Document, InputFile, Source, Span, origin
from data_prep.sources.files import FileSource
from data_prep.sources.lines import lines
from data_prep.sources.wiki import is_multistream, pages, stream_lines, unseen_namespaces


@dataclass(frozen=True, kw_only=True)
class WikidumpSource(FileSource, kind="wikidump"):
    malformed: ClassVar[frozenset[str]] = frozenset({"bad_xml", "line_too_long"})
    library: ClassVar[str | None] = "mwparserfromhell"

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """As many as wanted where the streams of the file can be entered one by one."""
        pieces, wanted = super().num_pieces(file, task_bytes), Source.num_pieces(self, file, task_bytes)
        return wanted if wanted > pieces and is_multistream(file.path) else pieces

    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """The articles whose page begins in the span."""
        several = is_multistream(file.path)
        found = stream_lines(file.path, span.begin) if several else lines(file.path, span.begin, span.end)
        for offset, page in pages(found, span.end, unseen_namespaces(file.path)):
            location = f"{file.path}, span {span.begin}, byte {offset}"
            if page.left_out:
                yield Bad(page.left_out, location)
            else:
                yield Document(page.text, location, origin(f"{span.file} {span.begin}", offset), False)
