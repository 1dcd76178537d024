"""MediaWiki dumps (pages-articles.xml, .bz2 multistream or not) -> articles without markup (cloze[wiki])."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from xml.etree import ElementTree

from cloze.errors import UserError
from cloze.storage import open_input
from data_prep.sources.lines import Line, compression, decompressed, split

MAX_PAGE_BYTES = 64 * 2**20
_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # a stream begins, at a whole byte
_LONGEST_STREAM = 8 * 2**20  # those of a multistream dump hold 100 pages: a second one begins within so many bytes
_READ = 2**18
_SPECIAL_LINK = re.compile(r"[^\W\d_]+:\S")  # [[File:…]], [[Kategorie:…]]; not [[Alien: Resurrection]]
_MARK = re.compile(
    r"<!--.*?(?:-->|\Z)|<(?P<closes>/?)(?P<tag>[A-Za-z][A-Za-z0-9]*)(?:[\s/][^<>]*?)?(?P<alone>/?)>|<(?=[A-Za-z/!])"
    r"|\{\{\{?|\}\}\}?|\{\||\|\}(?!\})|\[\[|\]\]|\[(?=[A-Za-z]+:|//)|\]",
    re.DOTALL,
)
_ENDS = {"{{": "}}", "{|": "|}", "[[": "]]", "[": "]"}  # three braces are taken for two
_NO_PROSE = "ref references table gallery math chem timeline score syntaxhighlight source imagemap"
_CUT = {"}}", "|}", *(f"</{tag}>" for tag in _NO_PROSE.split())}  # nothing is kept of what ends so
_ALONE = {"</br>", "</hr>", "</wbr>"}  # that is: does not, but stands alone
_DEEPEST = 30  # the parser gives up at 40
_INLINE = (
    "a abbr b bdi bdo big cite code data del dfn em font i ins kbd mark nowiki q s samp small span strike strong sub "
    "sup time tt u var wbr"
)
_QUOTES = re.compile("'{2,5}")  # italics and bold


class Page(NamedTuple):
    text: str  # without markup; empty if it was left out
    left_out: str  # the reason, or ""


def is_multistream(path: str) -> bool:
    """Whether it is a .bz2 of many streams, so that tasks can enter it in the middle."""
    if compression(path) != ".bz2":
        return False
    with open_input(path) as file:
        return sum(1 for _ in _STREAM.finditer(file.read(_LONGEST_STREAM))) > 1


def stream_lines(path: str, begin: int) -> Iterator[Line]:
    """The lines of the streams from the first that begins at `begin` or later on; their place is their stream's."""
    return split(chunk._replace(place=chunk.member) for chunk in decompressed(path, _next_stream(path, begin)))


def _next_stream(path: str, begin: int) -> int:
    """Where the first stream at or after `begin` begins; the end of the file if there is none."""
    with open_input(path) as file:
        file.seek(begin)
        before, offset = b"", begin
        while data := file.read(_READ):
            if match := _STREAM.search(before + data):
                return offset - len(before) + match.start()
            offset += len(data)
            before = (before + data)[-9:]
        return offset


def pages(lines: Iterable[Line], end: int) -> Iterator[tuple[int, Page]]:
    """(offset, page) of the pages up to the first whose place is `end` or later."""
    page: list[bytes] | None = None
    start = size = 0
    for place, offset, line, _ in lines:
        stripped = line.strip()
        if stripped == b"<page>":
            if place >= end:
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
    """The prose of an article: no headings, tables, templates, footnotes, files or categories, however they nest."""
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError("source=wikidump: needs mwparserfromhell: pip install 'cloze[wiki]'") from None
    text = "".join(_prose(mwparserfromhell.parse(_balanced(markup), skip_style_tags=True), mwparserfromhell.nodes))
    lines = [" ".join(line.strip(" \t*#:;").split()) for line in _QUOTES.sub("", text).split("\n")]
    return "\n\n".join(line for line in lines if line)


def _prose(code: Any, nodes: Any) -> Iterator[str]:
    """The text that a reader sees as running prose, of the nodes of `code` and what they hold."""
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            yield str(node.value)
        elif isinstance(node, nodes.HTMLEntity):
            yield str(node.normalize())
        elif isinstance(node, nodes.Wikilink):
            if not _SPECIAL_LINK.match(str(node.title).strip()):
                yield from _prose(node.title if node.text is None else node.text, nodes)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                yield from _prose(node.title, nodes)
            elif not node.brackets:
                yield str(node.url)
        elif isinstance(node, nodes.Tag):
            line = "" if str(node.tag).strip().lower() in _INLINE.split() else "\n"
            yield line
            if node.contents is not None:
                yield from _prose(node.contents, nodes)
            yield line


def _balanced(markup: str) -> str:
    """`markup` without what is not wanted, and without brackets and tags that have no counterpart.

    Over those the parser goes again and again, up to the end of the page: a page of 20,000 <ref> would take hours.
    """
    parts: list[str] = []
    begun: list[tuple[str, int]] = []  # and not ended: what ends it, and its index in `parts`
    counts: Counter[str] = Counter()  # of those, by what ends them
    place = 0
    for match in _MARK.finditer(markup):
        parts += markup[place : match.start()], ""
        place, mark, tag = match.end(), match[0][:2] if match[0][0] in "{}" else match[0], match["tag"]
        end = f"</{tag.lower()}>" if tag else _ENDS.get(mark, mark)
        if mark.startswith("<!--"):
            continue
        if mark == "<":
            parts[-1] = "&lt;"
        elif tag and (match["alone"] or end in _ALONE):
            parts[-1] = "" if end in _CUT else f"<{tag}/>"
        elif mark in _ENDS or (tag and not match["closes"]):
            if len(begun) < _DEEPEST:
                parts[-1] = f"<{tag}>" if tag else mark
                begun.append((end, len(parts) - 1))
                counts[end] += 1
        elif counts[end]:
            counts[end] -= 1
            while (last := begun.pop())[0] != end:
                parts[last[1]] = ""
                counts[last[0]] -= 1
            if end in _CUT:
                del parts[last[1] :]
            else:
                parts[-1] = end
        elif mark == "]":
            parts[-1] = mark
    for _, index in begun:
        parts[index] = ""
    return "".join([*parts, markup[place:]])
