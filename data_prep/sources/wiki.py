"""MediaWiki dumps (pages-articles.xml, .bz2 multistream or not) -> articles without markup (cloze[wiki])."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from xml.etree import ElementTree

from cloze.errors import UserError
from cloze.storage import open_input
from data_prep.sources.lines import Line, compression, decompressed, head, split
from data_prep.sources.wiki_templates import shown

MAX_PAGE_BYTES = 64 * 2**20
_STREAM = re.compile(rb"BZh[1-9]1AY&SY")  # a stream begins, at a whole byte
_LONGEST_STREAM = 8 * 2**20  # those of a multistream dump hold 100 pages: a second one begins within so many bytes
_READ = 2**18
_HEAD_BYTES = 2**16  # of a dump, in which its namespaces are listed
_NAMESPACE = re.compile(rb'<namespace key="(?:-2|6|14)"[^>]*>([^<]+)</namespace>')  # media, files, categories
_UNSEEN = frozenset(  # names of those namespaces, for dumps that list none
    [
        "media",
        "file",
        "image",
        "category",
        "datei",
        "bild",
        "kategorie",
        "fichier",
        "catégorie",
        "archivo",
        "imagen",
        "categoría",
        "ficheiro",
        "imagem",
        "categoria",
        "immagine",
        "bestand",
        "afbeelding",
        "categorie",
        "plik",
        "grafika",
        "kategoria",
        "файл",
        "изображение",
        "категория",
        "зображення",
        "категорія",
        "文件",
        "图像",
        "圖像",
        "檔案",
        "分类",
        "分類",
        "ファイル",
        "画像",
        "カテゴリ",
        "파일",
        "그림",
        "분류",
        "ملف",
        "صورة",
        "تصنيف",
        "پرونده",
        "رده",
        "קובץ",
        "תמונה",
        "קטגוריה",
        "fil",
        "berkas",
        "gambar",
        "tập_tin",
        "thể_loại",
        "dosya",
        "resim",
        "soubor",
        "kép",
        "fájl",
        "kategória",
        "चित्र",
        "श्रेणी",
        "ไฟล์",
        "หมวดหมู่",
        "αρχείο",
        "εικόνα",
        "κατηγορία",
    ]
)
_PAGE = re.compile(rb"<(/?)page>")
_REDIRECT = re.compile(r"\s*#(?:\s*redirect|[^\W\d_]+)\s*:?\s*\[\[[^\]\n]+\]\]", re.IGNORECASE)
_SWITCH = re.compile(r"__(?!_)(\w+?)__")  # __NOTOC__ in any language; not __init__
_CONVERTER = re.compile(r"(?<![{-])-\{([^{}]*)\}-")
_FLAGS = re.compile(r"\s*([A-Za-z;-]*)\s*\|")
_VARIANT = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]{2,4})?\s*:(?!//)\s*([^;]*)")
_GONE = "\x1a"  # stands where something was cut from running text; no XML can hold it
_PUNCTUATION = r"[\s;,:\u060c\u3001\uff1b\uff0c]*"
_TRACES = f"(?:{_PUNCTUATION}{_GONE})+{_PUNCTUATION}"
_HOLLOW = re.compile(rf"\s*[(\uff08]{_TRACES}[)\uff09]")
_AFTER_OPEN = re.compile(rf"(?<=[(\uff08]){_TRACES}")
_BEFORE_CLOSE = re.compile(rf"{_TRACES}(?=[)\uff09])")
_BEFORE_MARK = re.compile(rf"\s*{_GONE}(?=[.,;:!?])")
_WORD = re.compile(r"[^\W_]")
_NO_WORDS = re.compile(r"[^\w\s\x1b]")
_APOSTROPHE = "\x1b"  # stands for one that is no markup
_NEAR = 200  # characters on either side by which a template is in running text
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


@lru_cache(maxsize=8)
def unseen_namespaces(path: str) -> frozenset[str]:
    """In lower case, the names of the namespaces whose links no reader sees: what the dump says, and common names."""
    return _UNSEEN | {
        _plain_name(name.decode(errors="replace")) for name in _NAMESPACE.findall(head(path, _HEAD_BYTES))
    }


def _plain_name(name: str) -> str:
    return name.strip().replace(" ", "_").lower()


def pages(lines: Iterable[Line], end: int, unseen: Collection[str] = _UNSEEN) -> Iterator[tuple[int, Page]]:
    """(offset, page) of the pages up to the first whose place is `end` or later, however many stand in a line."""
    page: list[bytes] | None = None
    start = size = 0
    for place, offset, line, _ in lines:
        begin = 0
        for tag in _PAGE.finditer(line) if b"page>" in line else ():
            if not tag[1]:
                if place >= end:
                    return
                page, start, size, begin = [], offset + tag.start(), 0, tag.start()
            elif page is not None:
                page.append(line[begin : tag.end()])
                size += tag.end() - begin
                fits = size <= MAX_PAGE_BYTES
                yield start, _page(b"\n".join(page), unseen) if fits else Page("", "line_too_long")
                page = None
        if page is not None:
            size += len(line) - begin
            if size <= MAX_PAGE_BYTES:
                page.append(line[begin:])


def _page(data: bytes, unseen: Collection[str]) -> Page:
    try:
        page = ElementTree.fromstring(data)  # no bomb: a document type cannot stand inside <page>
    except ElementTree.ParseError:
        return Page("", "bad_xml")
    if page.findtext("ns", "0") != "0":
        return Page("", "other_namespace")
    markup = page.findtext("revision/text") or ""
    if page.find("redirect") is not None or _REDIRECT.match(markup):
        return Page("", "redirect")
    return Page(plain_text(markup, unseen), "")


def plain_text(markup: str, unseen: Collection[str] = _UNSEEN) -> str:
    """The prose of an article: no headings, tables, footnotes, files or categories, however they nest.

    Of a template there is what a reader sees of it in running text (wiki_templates.py), as far as that can be told.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError("source=wikidump: needs mwparserfromhell: pip install 'cloze[wiki]'") from None
    parsed = mwparserfromhell.parse(_balanced(_CONVERTER.sub(_converted, markup)), skip_style_tags=True)
    text = _QUOTES.sub("", "".join(_prose(parsed, mwparserfromhell.nodes, unseen))).replace(_APOSTROPHE, "'")
    text = _SWITCH.sub(lambda match: match[0] if match[1] != match[1].upper() else "", text)
    lines = [" ".join(_closed_up(line).strip(" \t*#:;").split()) for line in text.split("\n")]
    return "\n\n".join(line for line in lines if line)


def _closed_up(line: str) -> str:
    """`line` without what punctuation would be left around something that was cut: "Kyoto ( ; ) is"."""
    if _GONE not in line:
        return line
    line = _BEFORE_CLOSE.sub("", _AFTER_OPEN.sub("", _HOLLOW.sub("", line)))
    return _BEFORE_MARK.sub("", line).replace(_GONE, "")


def _converted(match: re.Match[str]) -> str:
    """Of the variants of a language (-{zh-hans:甲;zh-hant:乙}-) the first; chemistry's -{ stays as it is."""
    body, around = match[1], match.string[max(0, match.start() - 1) : match.start()] + match.string[match.end() :][:1]
    flags = _FLAGS.match(body)
    if flags and (flags[1].isupper() or not flags[1]) and not set("ATHD-+").isdisjoint(flags[1]):
        return ""  # rules for the page, shown nowhere
    if flags:
        body = body[flags.end() :]
    if variant := _VARIANT.match(body):
        return variant[1].strip()
    return body if flags or not (around.isascii() and any(map(str.isalnum, around))) else match[0]


def _prose(code: Any, nodes: Any, unseen: Collection[str]) -> Iterator[str]:
    """The text that a reader sees as running prose, of the nodes of `code` and what they hold."""
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            yield str(node.value)
        elif isinstance(node, nodes.HTMLEntity):
            yield str(node.normalize())
        elif isinstance(node, nodes.Wikilink):
            title = str(node.title).strip()
            if title.startswith(":") and node.text is None:
                yield title.lstrip(": ")
            elif node.text is not None and _plain_name(title.partition(":")[0]) not in unseen:
                yield from _prose(node.text, nodes, unseen)
            elif node.text is None and not _SPECIAL_LINK.match(title):
                yield from _prose(node.title, nodes, unseen)
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                yield from _prose(node.title, nodes, unseen)
            elif not node.brackets:
                yield str(node.url)
        elif isinstance(node, nodes.Tag):
            line = "" if str(node.tag).strip().lower() in _INLINE.split() else "\n"
            yield line
            if node.contents is not None:
                yield from _prose(node.contents, nodes, unseen)
            yield line


def _balanced(markup: str) -> str:
    """`markup` without what is not wanted, and without brackets and tags that have no counterpart.

    Over those the parser goes again and again, up to the end of the page: a page of 20,000 <ref> would take hours.
    """
    parts: list[str] = []
    begun: list[tuple[str, int, int]] = []  # and not ended: what ends it, its index in `parts`, its place
    counts: Counter[str] = Counter()  # of those, by what ends them
    place, last_literal = 0, markup.rfind("</nowiki")
    while match := _MARK.search(markup, place):
        parts += markup[place : match.start()], ""
        place, mark, tag = match.end(), match[0][:2] if match[0][0] in "{}" else match[0], match["tag"]
        end = f"</{tag.lower()}>" if tag else _ENDS.get(mark, mark)
        if match[0] == "}}}" and not _opens_three(begun, markup):
            place -= 1  # the last brace is of the next two
        if mark.startswith("<!--"):
            continue
        if mark == "<":
            parts[-1] = "&lt;"
        elif end == "</nowiki>" and mark.endswith(">") and not match["closes"] and place <= last_literal:
            literal = markup[place : markup.find("</nowiki", place)]
            parts[-1] = _NO_WORDS.sub(lambda found: f"&#{ord(found[0])};", literal.replace("'", _APOSTROPHE))
            place += len(literal)
        elif tag and (match["alone"] or end in _ALONE):
            parts[-1] = "" if end in _CUT else f"<{tag}/>"
        elif mark in _ENDS or (tag and not match["closes"]):
            if len(begun) < _DEEPEST:
                parts[-1] = f"<{tag}>" if tag else mark
                begun.append((end, len(parts) - 1, match.start()))
                counts[end] += 1
        elif counts[end]:
            counts[end] -= 1
            while (last := begun.pop())[0] != end:
                parts[last[1]] = ""
                counts[last[0]] -= 1
            if end in _CUT:
                body = "".join(parts[last[1] + 1 :]) if end == "}}" else ""
                del parts[last[1] :]
                parts.append(_left_of(body, markup[max(0, last[2] - _NEAR) : last[2]], markup[place : place + _NEAR]))
            else:
                parts[-1] = end
        elif mark == "]":
            parts[-1] = mark
    for _, index, _ in begun:
        parts[index] = ""
    return "".join([*parts, markup[place:]])


def _opens_three(begun: Sequence[tuple[str, int, int]], markup: str) -> bool:
    """Whether the innermost braces that are open are three, as those of a parameter."""
    return next((markup.startswith("{{{", place) for end, _, place in reversed(begun) if end == "}}"), True)


def _left_of(template: str, before: str, after: str) -> str:
    """What stands in place of something that was cut, between these texts: a template's prose, or a trace in a line."""
    before, after = before.rpartition("\n")[2], after.partition("\n")[0]
    text = shown(template, bool(_WORD.search(before) or _WORD.search(after))) if template else ""
    return text or (_GONE if before.strip() else "")
