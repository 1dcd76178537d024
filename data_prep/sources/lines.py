"""Stored bytes -> lines of text, from any place of a file, compressed or not.

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
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import zstandard

from cloze.errors import UserError
from cloze.storage import open_input, stamp

MAX_LINE_BYTES = 64 * 2**20  # a longer line comes in parts of at least so many: bounds memory

_PLAIN_BYTES, _COMPRESSED_BYTES = 16384, 2048  # a bite; zstd can make 64 MiB out of the latter, the others less,
_MOST_BYTES = 2**20  # but for bz2, which makes gigabytes: so many at a time
_KEPT_BYTES = 2**24  # of text past a span's end, for who goes on from there

_WINDOW_BYTES = 2**31  # the most that `zstd --ultra --long=31` makes; a process that reads such a file needs as much memory
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj(write_size=2**14),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
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


def lines(path: str, begin: int, end: int) -> Iterator[Line]:
    """The lines of a file from the first whose place is `begin` or later; those from `end` on are another's."""
    return split(_compressed(path, begin, end) if compression(path) else _plain(path, begin))


def split(chunks: Iterable[Chunk]) -> Iterator[Line]:
    """The lines of chunks that follow one another, from the first that begins in them."""
    parts: list[bytes] = []  # of the line that is under way
    size, goes_on = 0, False
    start: tuple[int, int] | None = None  # its place and offset; None: it began before
    for chunk in chunks:
        place, offset = chunk.place, chunk.offset
        if chunk.begins:
            start = place, offset
        *ended, last = chunk.data.split(b"\n")
        for piece in ended:
            if start:
                yield *start, b"".join([*parts, piece]) if parts else piece, goes_on
            parts, size, goes_on = [], 0, False
            offset += len(piece) + 1
            start = place, offset
        if start and last:
            parts.append(last)
            size += len(last)
        if start and size >= MAX_LINE_BYTES:
            yield *start, b"".join(parts), goes_on
            parts, size, goes_on = [], 0, True
    if start and parts:
        yield *start, b"".join(parts), goes_on


def _plain(path: str, begin: int) -> Iterator[Chunk]:
    place = -(-begin // _PLAIN_BYTES) * _PLAIN_BYTES
    with open_input(path) as file:
        file.seek(max(0, place - 1))
        begins = not place or file.read(1) == b"\n"
        while data := file.read(_PLAIN_BYTES):
            yield Chunk(place, 0, place, begins, data)
            place += len(data)
            begins = data.endswith(b"\n")


class _Pass:
    """One way through a compressed file, that a later span can go on with: spans mostly come in ascending order."""

    latest: ClassVar["_Pass | None"] = None  # of this process

    def __init__(self, path: str) -> None:
        self.file = (path, *stamp(path))
        self.left = 0  # the place where the last span ended
        self.chunks = decompressed(path)
        self.again: deque[Chunk] = deque()  # chunks past that place, read already


def _compressed(path: str, begin: int, end: int) -> Iterator[Chunk]:
    found, _Pass.latest = _Pass.latest, None
    if found is None or found.left > begin or found.file != (path, *stamp(path)):
        found = _Pass(path)
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


def decompressed(path: str, member: int = 0) -> Iterator[Chunk]:
    """A compressed file from the member that begins at `member` on. Members that follow one another are one text."""
    make = _DECOMPRESSORS[compression(path)]
    stream = None
    place, offset, begins = member, 0, True
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
                        yield Chunk(place, member, offset, begins, text)
                        offset += len(text)
                        begins = text.endswith(b"\n")
                    data = stream.unused_data if stream.eof else b""
                    stream = None if stream.eof else stream
                place = after
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); restore or leave out the file") from error
    if stream is not None:
        raise UserError(f"{path}: ends in the middle of its compressed data; restore or leave out the file")


def _produced(stream: Any, data: bytes) -> Iterator[bytes]:
    """What comes out of `data`, never empty."""
    limit = (_MOST_BYTES,) if isinstance(stream, bz2.BZ2Decompressor) else ()
    text = stream.decompress(data, *limit)
    while text:
        yield text
        text = stream.decompress(b"", *limit) if limit and not stream.eof and not stream.needs_input else b""
