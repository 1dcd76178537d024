"""Encodings of text files: what a byte order mark tells, where lines end, what bytes may be that are no UTF-8. Pure.

Lines end at \\n, \\r\\n and a lone \\r. U+0085, U+2028 and U+2029 end none: they stand inside lines of JSON and of web
text, no tool that wrote a corpus line by line took them for ends, and 0x85 is an ellipsis in Windows' code pages. They
are white space to whoever cuts sentences.
"""

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

UTF_8 = "utf-8"
UTF_8_MARK = codecs.BOM_UTF8
_MARKS = {  # the longer first: UTF-16's begins UTF-32's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: UTF_8,
}
_SAME = {"utf-8-sig": UTF_8, "utf-16": "utf-16-le", "utf-32": "utf-32-le"}  # without a mark, as Windows writes them
_GUESSED_BYTES = 2**14
_NO_TEXT = frozenset(range(32)) - {9, 10, 12, 13}


class Unit(NamedTuple):
    """What text in an encoding is made of, as far as ends of lines go.

    No character of more than one unit holds `newline` or `carriage_return`: true of every encoding of Python whose
    characters have more than one byte (the second and later ones of GB18030, Big5, Shift JIS, EUC and ISO 2022 are
    0x21 or above).
    """

    newline: bytes
    carriage_return: bytes

    @property
    def width(self) -> int:
        return len(self.newline)

    def breaks(self, data: bytes) -> list[tuple[int, int]]:
        """(begin, end) of the ends of lines in whole units of text; "\\r\\n" is one."""
        width = self.width
        order = "<" if self.newline[0] else ">"
        units = np.frombuffer(data, f"{order}u{width}", len(data) // width)
        newline, carriage_return = (int(np.frombuffer(c, units.dtype)[0]) for c in self)
        places = np.flatnonzero((units == newline) | (units == carriage_return)).tolist()
        found: list[tuple[int, int]] = []
        for place in places:
            begin = place * width
            if found and found[-1][1] == begin and units[place] == newline and units[place - 1] == carriage_return:
                found[-1] = found[-1][0], begin + width
            else:
                found.append((begin, begin + width))
        return found


BYTES = Unit(b"\n", b"\r")


@lru_cache
def unit_of(codec: str) -> Unit:
    return Unit("\n".encode(codec), "\r".encode(codec))


def codec_named(name: str) -> str | None:
    """Python's name of an encoding of text; None where there is none."""
    try:
        found = codecs.lookup(name)
        "".encode(name)  # refuses what is no encoding of text, such as "hex"
    except (LookupError, ValueError, UnicodeError):
        return None
    return _SAME.get(found.name, found.name)


def codec_of(head: bytes, encoding: str) -> str:
    """How to decode a text that begins with `head`: as its byte order mark says, else as `encoding`; "auto" = UTF-8."""
    for mark, codec in _MARKS.items():
        if head.startswith(mark):
            return codec
    return UTF_8 if encoding == "auto" else codec_named(encoding) or UTF_8


def to_utf_8(line: bytes, codec: str) -> bytes:
    """A line in UTF-8. What `codec` cannot read becomes 0xFF, which is no UTF-8: whoever decodes it counts a repair."""
    try:
        return line.decode(codec).encode(errors="surrogatepass")
    except UnicodeDecodeError:
        return line.decode(codec, "replace").encode(errors="surrogatepass").replace(b"\xef\xbf\xbd", b"\xff")


def guessed(lines: Sequence[bytes]) -> str | None:
    """What encoding lines that are no UTF-8 look like; None where they look like no text, or nothing here can tell."""
    data = b"\n".join(lines)[:_GUESSED_BYTES]
    if not data:
        return None
    zeros = [data[half::2].count(0) / (len(data) / 2) for half in (0, 1)]
    if max(zeros) > 0.3 > 0.1 > min(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if sum(byte in _NO_TEXT for byte in data) > 0.01 * len(data):
        return None
    return _guess(data)


def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes  # 20 ms: only where something is no UTF-8

    best = from_bytes(data).best()
    name = None if best is None else codec_named(best.encoding)
    return None if name in (None, UTF_8, "ascii") else name
