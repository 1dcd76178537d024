"""Document text -> repaired text -> kept, or dropped for a reason that is counted. Pure; knows no files.

A filter takes the repaired text and returns `True`, or `(False, reason)`. New ones go into `filters_for`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

Verdict = Literal[True] | tuple[Literal[False], str]
Filter = Callable[[str], Verdict]


_CONTROL = re.compile("[\x01-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are no white space
_ASCII_CONTROL = bytes(byte for byte in range(128) if _CONTROL.match(chr(byte)))
_OTHER_CONTROL = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")  # in UTF-8
_LOOKED_AT = 2**16  # characters of a document by which its scripts and symbols are judged
_MOST_GARBLED = 0.2  # of the characters; a page of Latin-1 read as UTF-8 has a few in a hundred, binary data half
_LETTERS = re.compile(r"[^\W\d_]")
_SYMBOLS = re.compile(r"[^\w\s]|_")
SCRIPTS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u05d0-\u05ea",
    "arabic": "\u0620-\u06ff\u0750-\u077f\u0870-\u08ff",
    "devanagari": "\u0900-\u097f",
    "bengali": "\u0980-\u09ff",
    "thai": "\u0e00-\u0e7f",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f",
    "kana": "\u3040-\u30ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7a3",
}


def repair(text: str, nfc: bool = False) -> tuple[str, tuple[str, ...]]:
    """`text` without what no tokenizer should see, and the names of the repairs that were needed.

    Lone surrogates become U+FFFD, NUL and other control characters go, line ends become \\n, and text becomes Unicode
    NFC where `nfc` asks for it.
    """
    repairs: list[str] = []
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            repairs.append("lone_surrogates")
        text = text.removeprefix("\ufeff")
        if nfc and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            repairs.append("not_nfc")
    if "\0" in text:
        text = text.replace("\0", "")
        repairs.append("nul_characters")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _has_control(text.encode()):
        text = _CONTROL.sub("", text)
        repairs.append("control_characters")
    return text, tuple(repairs)


def _has_control(data: bytes) -> bool:
    """What `_CONTROL` would find in a text of this UTF-8, three times as fast."""
    if len(data.translate(None, _ASCII_CONTROL)) < len(data):
        return True
    return b"\xc2" in data and _OTHER_CONTROL.search(data) is not None


def is_garbled(text: str) -> bool:
    """Whether a text, before it is repaired, can have been no text in UTF-8: too much is U+FFFD, NUL or control."""
    part = text[:_LOOKED_AT]
    found = part.count("\ufffd") + part.count("\0")
    return found > 0 and found + len(_CONTROL.findall(part)) > _MOST_GARBLED * len(part)


def not_empty(text: str) -> Verdict:
    return True if text and not text.isspace() else (False, "empty")


def at_least(characters: int) -> Filter:
    def long_enough(text: str) -> Verdict:
        return True if len(text) >= characters else (False, "too_short")

    return long_enough


def written_in(scripts: Sequence[str], share: float) -> Filter:
    """At least `share` of the letters are of one of these scripts."""
    wanted = re.compile(f"[{''.join(SCRIPTS[script] for script in scripts)}]")

    def in_script(text: str) -> Verdict:
        letters = _LETTERS.findall(text[:_LOOKED_AT])
        ours = len(wanted.findall("".join(letters)))
        return True if letters and ours >= share * len(letters) else (False, "other_script")

    return in_script


def few_symbols(most: float) -> Filter:
    """At most this share of the characters that are not white space are neither letters nor digits."""

    def prose(text: str) -> Verdict:
        part = text[:_LOOKED_AT]
        visible = sum(map(len, part.split()))
        return True if len(_SYMBOLS.findall(part)) <= most * visible else (False, "symbols")

    return prose


def few_repeated_lines(most: float) -> Filter:
    """At most this share of the lines that are not blank stand there before."""

    def varied(text: str) -> Verdict:
        counts = Counter(line for line in map(str.strip, text.split("\n")) if line)
        return True if counts.total() - len(counts) <= most * counts.total() else (False, "repeated_lines")

    return varied


def filters_for(
    min_characters: int,
    scripts: Sequence[str] = (),
    min_script_share: float = 0,
    max_symbols: float | None = None,
    max_repeated_lines: float | None = None,
) -> tuple[Filter, ...]:
    """The filters of a run, cheapest first."""
    filters: list[Filter] = [not_empty, at_least(min_characters)]
    if max_repeated_lines is not None:
        filters.append(few_repeated_lines(max_repeated_lines))
    if max_symbols is not None:
        filters.append(few_symbols(max_symbols))
    if scripts:
        filters.append(written_in(scripts, min_script_share))
    return tuple(filters)


def judge(text: str, filters: Sequence[Filter]) -> Verdict:
    """The first refusal, or `True`."""
    for accepts in filters:
        verdict = accepts(text)
        if verdict is not True:
            return verdict
    return True
