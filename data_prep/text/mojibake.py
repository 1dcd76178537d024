"""UTF-8 that was once read as another encoding ("Ã©" for "é"): found by going the way back. Pure.

What stands outside ASCII is turned into the bytes that it had in each of some encodings; where these are UTF-8 of
ordinary letters and marks, it was no accident: sound text is hardly ever.
"""

import re
from collections.abc import Iterator

_RUN = re.compile("[^\x00-\x7f\ufffd]{2,}")
_REPLACED = "\u951f\u65a4\u62f7"  # U+FFFD twice, read as GBK
_MOST_BYTES = 256  # of a run
_PLAUSIBLE = re.compile(  # what people write: Latin, Greek, Cyrillic, Hebrew, Arabic, India, Thai, quotes, East Asia
    "[\u00a0-\u017f\u0218-\u021b\u0384-\u03ce\u0400-\u045f\u0490\u0491\u05d0-\u05ea\u0621-\u064a\u0660-\u06d4\u0901-\u0def"
    "\u0e01-\u0edf\u1e00-\u1ef9\u2010-\u203a\u20ac\u2122\u3001-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e]"
)
_MOSTLY = 0.6  # of the letters: control characters that were removed since have broken some
_SINGLE = ("cp1252", "cp1250", "cp1251", "cp1254", "mac-roman", "cp437", "cp850", "cp866")
_FEWEST_OF_GBK = 6  # bytes: of fewer, one or two letters may be UTF-8 by chance


def _bytes_of(codec: str) -> dict[int, int]:
    """Byte by character; control characters, which some readers take for what an encoding lacks, are themselves."""
    high = bytes(range(0x80, 0x100)).decode(codec, "replace")
    return {
        **{byte: byte for byte in range(0x80, 0xA0)},
        **{ord(c): 0x80 + i for i, c in enumerate(high) if c != "\ufffd"},
    }


_TABLES = [_bytes_of(codec) for codec in _SINGLE]


def garbled(text: str) -> str | None:
    """The first place that is mojibake, with a little of what stands around it."""
    for run in _RUN.finditer(text):
        if _REPLACED in run[0] or any(_is_utf_8(data) for data in _went_in(run[0])):
            return text[max(0, run.start() - 8) : run.start() + 16]
    return None


def _went_in(run: str) -> Iterator[bytes]:
    """The bytes that a run would have been."""
    for table in _TABLES:
        found = run[:_MOST_BYTES].translate(table)
        if max(found) <= "\xff":
            yield found.encode("latin-1")
    data = run[:_MOST_BYTES].encode("gb18030", "replace")
    if run[0] >= "\u2e80" and len(data) >= _FEWEST_OF_GBK:
        yield data


def _is_utf_8(data: bytes) -> bool:
    text = data.decode(errors="replace")
    return len(_PLAUSIBLE.findall(text)) > _MOSTLY * len(text)
