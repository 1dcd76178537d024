"""Encodings of text files: what a byte order mark tells, where lines end, what bytes may be that are no UTF-8. Pure.

Lines end at \\n, \\r\\n and a lone \\r. U+0085, U+2028 and U+2029 end none: they stand inside lines of JSON and of web
text, no tool that wrote a corpus line by line took them for ends, and 0x85 is an ellipsis in Windows' code pages. They
are white space to whoever cuts sentences.
"""

import codecs
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

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
_COMMON = frozenset(map(ord, " \n\r,.\u3000\u3001\u3002\uff0c"))  # in two bytes they tell the order of the bytes
_ESCAPES = {b"\x1b$B": "iso2022_jp", b"\x1b$@": "iso2022_jp"}  # of seven bits, so that they are UTF-8, too
_NO_TEXT = frozenset(range(32)) - {9, 10, 12, 13}
_SURE = 0.9  # share of the letters
_LATIN = (
    "cp1252",
    "iso8859-15",
    "cp1250",
    "iso8859-2",
    "cp1254",
    "cp1257",
    "iso8859-16",
    "mac-roman",
    "mac-latin2",
    "cp850",
    "cp852",
)
_CYRILLIC = ("cp1251", "koi8-r", "koi8-u", "cp866", "cp1125", "iso8859-5", "mac-cyrillic")
_OTHERS = ("shift_jis", "euc_jp", "cp949", "big5", "gb18030", "iso8859-6", "cp1256", "cp1255", "cp1253", "cp874")
_ORDINARY = re.compile(
    "[\u0384-\u03ce\u05d0-\u05ea\u060c-\u064a\u0e01-\u0e5b\u3001-\u30ff\u4e00-\u9fa5\uac00-\ud7a3\uff01-\uff5e]"
)
_MARKS_OF_ALL = frozenset("\u00a0\u00ad\u00ab\u00bb\u00b0\u00b7\u00a7\u00a9\u00ae\u20ac\u2122") | {
    *map(chr, range(0x2010, 0x203B))
}
_LANGUAGES = (  # letters outside ASCII, of those that these encodings were made for
    "àâæçéèêëîïôœùûüÿ",  # French
    "äöüßåéšž",  # German, Swedish, Estonian
    "áâãàçéêíñóôõúü¿¡ªº",  # Spanish, Portuguese
    "àèéìíïòóùúüç",  # Italian, Catalan
    "æøåéèëïóöü",  # Danish, Norwegian, Dutch
    "áéíóúýþæöð",  # Icelandic
    "ąćęłńóśźż",  # Polish
    "áäčďéěíĺľňóôŕřšťúůýž",  # Czech, Slovak
    "áéíóöőúüű",  # Hungarian
    "ăâîșşțţ",  # Romanian
    "čćđšž",  # Croatian, Slovene
    "çğıöşüâîû",  # Turkish
    "ąčęėįšųūž",  # Lithuanian
    "āčēģīķļņšūž",  # Latvian
)
_LETTERS = frozenset("".join(_LANGUAGES))


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
        import numpy as np  # only where text is wide: a --help does not wait for it

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


def escaped(line: bytes) -> str | None:
    """The encoding of a line that shifts between alphabets, and looks like UTF-8; None of others."""
    return next((codec for escape, codec in _ESCAPES.items() if escape in line), None)


def guessed(lines: Sequence[bytes], head: bytes = b"") -> str | None:
    """What encoding lines that are no UTF-8 look like; None where they look like no text, or nothing here can tell.

    `head`: how the text begins. Only by that are UTF-16 and UTF-32 known, of which lines are no whole part.
    """
    data = b"\n".join(lines)[:_GUESSED_BYTES]
    if not data:
        return None
    if codec := escaped(data) or _wide(head[:_GUESSED_BYTES] or data):
        return codec
    if sum(byte in _NO_TEXT for byte in data) > 0.01 * len(data):
        return None
    return _guess(data)


def _wide(data: bytes) -> str | None:
    """UTF-32 or UTF-16 without a mark."""
    for codec in ("utf-32-le", "utf-32-be") if len(data) >= 16 else ():
        with suppress(UnicodeDecodeError):
            if "\0" not in data[: len(data) // 4 * 4].decode(codec):  # of other data hardly a unit is one of Unicode's
                return codec
    zeros = [data[half::2].count(0) / (len(data) / 2) for half in (0, 1)]
    if max(zeros) > 0.3 > 0.1 > min(zeros):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    import numpy as np

    units = len(data) // 2
    common = [np.isin(np.frombuffer(data, order, units), [*_COMMON]).sum() for order in ("<u2", ">u2")]
    if max(common) > 0.02 * units and max(common) > 4 * min(common):
        return "utf-16-le" if common[0] > common[1] else "utf-16-be"
    return None


def _guess(data: bytes) -> str | None:
    from charset_normalizer import from_bytes  # 20 ms: only where something is no UTF-8

    data = data[: data.rfind(b"\n")] if len(data) == _GUESSED_BYTES and b"\n" in data else data  # no half letters
    if sum(byte < 0x80 and chr(byte).isalpha() for byte in data) > sum(byte >= 0x80 for byte in data):
        return _best(data, _LATIN, _of_a_language) or _best(data, _LATIN, _of_languages)
    best = from_bytes(data).best()
    name = None if best is None else codec_named(best.encoding)
    if name in _CYRILLIC:
        return _best(data, _CYRILLIC, _lower_cyrillic) or _best(data, ("iso8859-6",), _ordinary) or name
    if name in (None, UTF_8, "ascii"):
        return _best(data, _OTHERS, _ordinary)
    return name


def _best(data: bytes, codecs: Sequence[str], score: Callable[[str], float]) -> str | None:
    """The first of the encodings that read all of it, and read most of it as what people write."""
    scores: dict[str, float] = {}
    for codec in codecs:
        with suppress(UnicodeDecodeError):
            scores[codec] = score(data.decode(codec))
    best = max(scores, key=lambda codec: scores[codec], default=None)
    return best if best and scores[best] > _SURE else None


def _of_a_language(text: str) -> float:
    """Share of the letters outside ASCII that one language has."""
    letters = Counter(letter for letter in text.lower() if letter > "\x7f" and letter not in _MARKS_OF_ALL)
    most = max(sum(letters[letter] for letter in language) for language in _LANGUAGES)
    return most / max(1, letters.total())


def _of_languages(text: str) -> float:
    """Share of the letters outside ASCII that any of the languages has: of text in several."""
    letters = [letter for letter in text.lower() if letter > "\x7f" and letter not in _MARKS_OF_ALL]
    return sum(letter in _LETTERS for letter in letters) / max(1, len(letters))


def _lower_cyrillic(text: str) -> float:
    """Share of lower-case letters: encodings differ in where those are."""
    return sum("\u0430" <= letter <= "\u045f" for letter in text) / max(1, sum(letter > "\x7f" for letter in text))


def _ordinary(text: str) -> float:
    """Share of Greek, Hebrew, Arabic and Thai letters, kana, Hangul, common ideographs and their punctuation."""
    return len(_ORDINARY.findall(text)) / max(1, sum(letter > "\x7f" for letter in text))
