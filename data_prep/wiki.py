"""MediaWiki dumps (pages-articles.xml, .bz2 multistream or not) -> articles without markup (cloze[wiki])."""

import bz2
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple
from xml.etree import ElementTree

from data_prep.errors import UserError
from data_prep.storage import open_input

MAX_PAGE_BYTES = 64 * 2**20
_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # a stream begins, at a whole byte
_LONGEST_STREAM = 8 * 2**20  # those of a multistream dump hold 100 pages: a second one begins within so many bytes
_READ = 2**18
_SPECIAL_LINK = re.compile(r"[^\W\d_]+:\S")  # [[File:…]], [[Kategorie:…]]; not [[Alien: Resurrection]]
_QUOTES = re.compile("'{2,5}")  # italics and bold
_NO_TEXT = (
    "ref",
    "table",
    "gallery",
    "math",
    "timeline",
    "score",
    "syntaxhighlight",
    "source",
    "imagemap",
    "references",
)


class Page(NamedTuple):
    text: str  # without markup; empty if it was left out
    left_out: str  # the reason, or ""


def is_multistream(path: str) -> bool:
    """Whether a .bz2 consists of many streams, so that tasks can enter it in the middle."""
    with open_input(path) as file:
        return sum(1 for _ in _STREAM.finditer(file.read(_LONGEST_STREAM))) > 1


def stream_lines(path: str, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset in what is decompressed here, line) of the streams that begin in [begin, end) of the stored bytes."""
    offset, rest = 0, b""
    for data in _streams(path, begin, end):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield offset, line
            offset += len(line) + 1
    if rest:
        yield offset, rest


def _streams(path: str, begin: int, end: int) -> Iterator[bytes]:
    with open_input(path) as file:
        position = _next_stream(file, begin)
        file.seek(position)
        stored = file.read(_READ)
        while stored and position < end:
            stream = bz2.BZ2Decompressor()
            while not stream.eof:
                if not stored:
                    raise UserError(f"{path}: ends in the middle of its compressed data; restore or leave out the file")
                position += len(stored)
                try:
                    yield stream.decompress(stored)
                except OSError as error:
                    raise UserError(
                        f"{path}: cannot be decompressed ({error}); restore or leave out the file"
                    ) from error
                stored = b"" if stream.eof else file.read(_READ)
            position -= len(stream.unused_data)
            stored = stream.unused_data or file.read(_READ)


def _next_stream(file: BinaryIO, begin: int) -> int:
    """Where the first stream at or after `begin` begins; the end of the file if there is none."""
    file.seek(begin)
    before, offset = b"", begin
    while data := file.read(_READ):
        if match := _STREAM.search(before + data):
            return offset - len(before) + match.start()
        offset += len(data)
        before = (before + data)[-9:]
    return offset


def pages(lines: Iterable[tuple[int, bytes]], owns: Callable[[int], bool]) -> Iterator[tuple[int, Page]]:
    """(offset, page) of the pages that begin on lines which `owns` accepts; stops at the first that it does not."""
    page: list[bytes] | None = None
    start = size = 0
    for offset, line in lines:
        stripped = line.strip()
        if stripped == b"<page>":
            if not owns(offset):
                return
            page, start, size = [], offset, 0
        if page is None:
            continue
        size += len(line)
        if size <= MAX_PAGE_BYTES:
            page.append(line)
        if stripped == b"</page>":
            yield start, _page(b"\n".join(page)) if size <= MAX_PAGE_BYTES else Page("", "line_too_long")
            page = None


def _page(data: bytes) -> Page:
    try:
        page = ElementTree.fromstring(data)  # no bomb: a document type cannot stand inside <page>
    except ElementTree.ParseError:
        return Page("", "bad_xml")
    if page.findtext("ns", "0") != "0":
        return Page("", "other_namespace")
    if page.find("redirect") is not None:
        return Page("", "redirect")
    return Page(plain_text(page.findtext("revision/text") or ""), "")


def plain_text(markup: str) -> str:
    """The prose of an article: no headings, tables, templates, footnotes, files or categories."""
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError("source=wikidump: needs mwparserfromhell: pip install 'cloze[wiki]'") from None
    nodes = mwparserfromhell.nodes
    code = mwparserfromhell.parse(markup, skip_style_tags=True)

    def unwanted(node: Any) -> bool:
        return (
            isinstance(node, nodes.Heading | nodes.Comment | nodes.Template)
            or (isinstance(node, nodes.Tag) and str(node.tag).strip().lower() in _NO_TEXT)
            or (isinstance(node, nodes.Wikilink) and _SPECIAL_LINK.match(str(node.title).strip()) is not None)
        )

    for node in code.filter(recursive=False, matches=unwanted):
        code.remove(node)
    text = str(code.strip_code(normalize=True, collapse=True))
    lines = [line.strip(" \t*#:;") for line in _QUOTES.sub("", text).split("\n")]
    return "\n\n".join(line for line in lines if line)
