"""Stored bytes -> lines of text, from any place of a file, compressed or not. What ends a line: cloze/encodings.py.

A file is taken in bites of a fixed size. The place of a line is where the bite begins that its first byte came out of,
so that every line has one, also in a compressed file, and any cut of a file into spans of places gives each line to one
span. A compressed file cannot be entered in the middle: it is decompressed from its start, unless this process has read
an earlier span of it and can go on from there.
"""

import bz2
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import zstandard

from cloze.encodings import BYTES, Unit
from cloze.errors import UserError
from cloze.storage import open_input, stamp

MAX_LINE_BYTES = 64 * 2**20  # a longer line comes in parts of at least so many: bounds memory

_PLAIN_BYTES, _COMPRESSED_BYTES = 16384, 2048  # a bite; zstd can make 64 MiB out of the latter, the others less,
_MOST_BYTES = 2**20  # but for bz2, which makes gigabytes: so many at a time
_KEPT_BYTES = 2**24  # of text past a span's end, for who goes on from there

_WINDOW_BYTES = 2**31  # the most that `zstd --ultra --long=31` makes; whoever reads such a file needs as much memory
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj(write_size=2**14),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (
        b"\x28\xb5\x2f\xfd",
        *(bytes([first, 0x2A, 0x4D, 0x18]) for first in range(0x50, 0x60)),
    ),  # or to be skipped
    ".xz": (b"\xfd7zX", b"]\0\0"),
    ".bz2": (b"BZh",),
}

Line = tuple[int, int, bytes, bool]  # place, offset in the text, bytes without line break, whether a long line goes on


class Chunk(NamedTuple):
    """Text that came out of a bite."""

    place: int  # where the bite begins in the stored file
    member: int  # where the member (stream, frame) begins that it belongs to
    offset: int  # in the text
    begins: bool  # a line begins with its first byte
    data: bytes


def compression(path: str) -> str:
    """The suffix that tells how a file is compressed; "" for a plain one."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _DECOMPRESSORS else ""


def lines(path: str, begin: int, end: int, unit: Unit = BYTES) -> Iterator[Line]:
    """The lines of a file from the first whose place is `begin` or later; those from `end` on are another's."""
    return split(_compressed(path, begin, end, unit) if compression(path) else _plain(path, begin, unit), unit)


def head(path: str, size: int) -> bytes:
    """The first bytes of a file's text, `size` of them where there are so many."""
    if not compression(path):
        with open_input(path) as file:
            return file.read(size)
    found = bytearray()
    for chunk in decompressed(path):
        found += chunk.data
        if len(found) >= size:
            break
    return bytes(found[:size])


def split(chunks: Iterable[Chunk], unit: Unit = BYTES) -> Iterator[Line]:
    """The lines of chunks that follow one another, from the first that begins in them."""
    parts: list[bytes] = []  # of the line that is under way
    size, goes_on = 0, False
    start: tuple[int, int] | None = None  # its place and offset; None: it began before
    for chunk in chunks:
        place, offset = chunk.place, chunk.offset
        if chunk.begins:
            start = place, offset
        *ended, last = _pieces(chunk.data, unit)
        for piece, width in ended:
            if start:
                yield *start, b"".join([*parts, piece]) if parts else piece, goes_on
            parts, size, goes_on = [], 0, False
            offset += len(piece) + width
            start = place, offset
        if start and last[0]:
            parts.append(last[0])
            size += len(last[0])
        if start and size >= MAX_LINE_BYTES:
            yield *start, b"".join(parts), goes_on
            parts, size, goes_on = [], 0, True
    if start and parts:
        yield *start, b"".join(parts), goes_on


def _pieces(data: bytes, unit: Unit) -> Iterable[tuple[bytes, int]]:
    """What lies between the ends of lines, each with the bytes of the end that follows."""
    if unit == BYTES and b"\r" not in data:
        return zip(data.split(b"\n"), repeat(1))
    breaks = unit.breaks(data)
    begins = [0, *(end for _, end in breaks)]
    ends = [*breaks, (len(data), len(data))]
    return [(data[begin:end], after - end) for begin, (end, after) in zip(begins, ends, strict=True)]


class _Text:
    """Bytes of a text as they come, in whole units -> chunks that know whether a line begins with them."""

    def __init__(self, unit: Unit, before: bytes | None) -> None:
        self.unit = unit
        self.before = before  # the unit before; None: there is none
        self.rest = b""  # less than a unit

    def chunk(self, place: int, member: int, offset: int, data: bytes) -> Chunk:
        """`data`, which follows `rest` at `offset`; without a "\n" whose "\r" came before."""
        newline, carriage_return = self.unit
        if len(newline) > 1:
            data = self.rest + data
            offset -= len(self.rest)
            whole = len(data) // len(newline) * len(newline)
            data, self.rest = data[:whole], data[whole:]
        begins = self.before is None or self.before in self.unit
        between = self.before == carriage_return and data.startswith(newline)
        self.before = data[-len(newline) :] or self.before
        return Chunk(place, member, offset + between * len(newline), begins, data[between * len(newline) :])


def _plain(path: str, begin: int, unit: Unit) -> Iterator[Chunk]:
    bite = _PLAIN_BYTES * unit.width
    place = -(-begin // bite) * bite
    with open_input(path) as file:
        file.seek(max(0, place - unit.width))
        text = _Text(unit, file.read(unit.width) if place else None)
        while data := file.read(bite):
            yield text.chunk(place, 0, place, data)
            place += len(data)


class _Pass:
    """One way through a compressed file, that a later span can go on with: spans mostly come in ascending order."""

    latest: ClassVar["_Pass | None"] = None  # of this process

    def __init__(self, path: str, unit: Unit) -> None:
        self.file = (path, unit, *stamp(path))
        self.left = 0  # the place where the last span ended
        self.chunks = decompressed(path, unit=unit)
        self.again: deque[Chunk] = deque()  # chunks past that place, read already


def _compressed(path: str, begin: int, end: int, unit: Unit) -> Iterator[Chunk]:
    found, _Pass.latest = _Pass.latest, None
    if found is None or found.left > begin or found.file != (path, unit, *stamp(path)):
        found = _Pass(path, unit)
    beyond: list[Chunk] = []
    room = _KEPT_BYTES
    try:
        while chunk := found.again.popleft() if found.again else next(found.chunks, None):
            if chunk.place >= end:
                room -= len(chunk.data)
                beyond = [*beyond, chunk] if room >= 0 else []
            if chunk.place >= begin:
                yield chunk
    except GeneratorExit:  # whoever asked has seen enough
        if room >= 0:
            found.left = end
            found.again.extendleft(reversed(beyond))
            _Pass.latest = found
        raise


def decompressed(path: str, member: int = 0, unit: Unit = BYTES) -> Iterator[Chunk]:
    """A compressed file from the member that begins at `member` on. Members that follow one another are one text."""
    make = _DECOMPRESSORS[compression(path)]
    stream = None
    place, offset, whole = member, 0, _Text(unit, None)
    try:
        with open_input(path) as file:
            file.seek(place)
            while data := file.read(_COMPRESSED_BYTES):
                after = place + len(data)
                while data:
                    if stream is None:
                        data = data.lstrip(b"\0")  # padding between or after members
                        if not data:
                            break
                        stream, member = make(), after - len(data)
                    for text in _produced(stream, data):
                        yield whole.chunk(place, member, offset, text)
                        offset += len(text)
                    data = stream.unused_data if stream.eof else b""
                    stream = None if stream.eof else stream
                place = after
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError) as error:
        if offset == 0 and not _is_named_rightly(path):
            raise UserError(
                f"{path}: is no {compression(path)} file, whatever its name says; rename or restore it"
            ) from error
        raise UserError(f"{path}: cannot be decompressed ({error}); restore or leave out the file") from error
    if stream is not None:
        raise UserError(f"{path}: ends in the middle of its compressed data; restore or leave out the file")


def _is_named_rightly(path: str) -> bool:
    with open_input(path) as file:
        return file.read(4).startswith(_MAGIC[compression(path)])


def _produced(stream: Any, data: bytes) -> Iterator[bytes]:
    """What comes out of `data`, never empty."""
    limit = (_MOST_BYTES,) if isinstance(stream, bz2.BZ2Decompressor) else ()
    text = stream.decompress(data, *limit)
    while text:
        yield text
        text = stream.decompress(b"", *limit) if limit and not stream.eof and not stream.needs_input else b""
