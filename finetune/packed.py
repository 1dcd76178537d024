"""The bytes of a file wherever it lies, plain or compressed, in pieces. What is torn is refused."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from cloze.errors import UserError, first_line
from cloze.storage import open_input

BLOCK_BYTES = 2**18

_ZSTD_BYTES = 2**12  # compressed; they may become thousands of times as many
_ZSTD_WINDOW_BYTES = 2**31  # the most that `zstd --ultra --long=31` makes


def blocks(path: str) -> Iterator[bytes]:
    """What is in a file, decompressed as its name says; no piece is empty. Raises `UserError`, without its name."""
    ending = Path(path).suffix.lower()
    try:
        with open_input(path) as file:
            if ending == ".zst":
                yield from _zstd(file)
                return
            with _OPENERS[ending](file) if ending in _OPENERS else file as plain:
                while data := plain.read(BLOCK_BYTES):
                    yield data
    except FileNotFoundError:
        raise UserError("no such file") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile) as error:
        why = "it is a directory" if isinstance(error, IsADirectoryError) else first_line(error)
        raise UserError(f"cannot be read ({why}); a whole file is needed") from error


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a zstd file. The library's own reader takes a torn frame's end for the file's."""
    frame: Any = None
    while data := file.read(_ZSTD_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            if text := frame.decompress(data):
                yield text
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of its compressed data")


def _zip(file: BinaryIO) -> Any:
    archive = zipfile.ZipFile(file)
    names = [one.filename for one in archive.infolist() if not one.is_dir()]
    if len(names) != 1:
        raise UserError(f"holds {len(names)} files; unpack it and name one of them")
    return archive.open(names[0])


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile, ".zip": _zip
}  # fmt: skip
