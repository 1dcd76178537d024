"""Input files -> documents, in tasks of similar size that can be read apart.

A task is a list of spans. A plain file is cut at byte offsets. A compressed file cannot be entered in the middle: a
task decompresses it from the start to the end of its span of the *stored* bytes, unless the process that runs it has
just read an earlier span and can go on from there. `_MOST_TASKS` keeps that cheap next to encoding in the worst case;
a corpus of many files has no such limit. An item belongs to the span in which it begins, so every one is read once.

Knows formats and files; knows nothing of what becomes of a document.
"""

import ast
import bz2
import hashlib
import io
import json
import lzma
import os
import sysconfig
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import zstandard

from data_prep.config import DocumentBoundary, SourceConfig, SourceKind
from data_prep.errors import UserError
from data_prep.storage import changed, is_remote, open_input, remote_matches, stamp
from data_prep.tables import hub_rows, hub_size, parquet_rows, parquet_size
from data_prep.wiki import is_multistream, pages, stream_lines

MAX_LINE_BYTES = 64 * 2**20  # a longer JSON line is refused: bounds memory
PART_BYTES = 4 * 2**20  # a longer text is handed on in parts

_FEED_BYTES = 4096  # stored bytes decompressed at a time: no more than 128 MiB can come out of it, whatever it holds
_MEASURED_FILES = 64  # compressed files whose ratio is measured; the others are taken for their like
_TASKS = 128  # wanted, within the bounds that follow
_MIN_TASK_BYTES, _MAX_TASK_BYTES = 2**20, 64 * 2**20  # of text
_NO_PROSE = ("__pycache__", "test", "tests")  # directories of code with next to no docstrings
_DOCSTRING_SHARE = 8  # one byte in about so many of Python code is docstring

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
_MOST_TASKS = {".gz": 16, ".zst": 32, ".xz": 8, ".bz2": 4}  # of one file: the slower to decompress, the fewer


class InputFile(NamedTuple):
    path: str  # absolute, or a URL, or the name of a data set
    bytes: int  # as stored
    version: int  # changes with the content: time of modification, or what the store says
    text_bytes: int  # decompressed: known for plain files, estimated for compressed ones
    units: int  # what spans count: bytes, row groups, shards
    source: int = 0  # index into the plan's sources


class Span(NamedTuple):
    file: int  # index into the plan's files
    begin: int  # units of the file: stored bytes, mostly
    end: int


class Document(NamedTuple):
    text: str
    location: str  # for messages: file and byte offset or line
    origin: int  # u64, equal for the parts of one long text
    repaired: bool  # it held invalid UTF-8, now U+FFFD


class Bad(NamedTuple):
    """An item that is no document."""

    reason: str
    location: str


# -- what there is to read ------------------------------------------------------------------------------------------


def find_inputs(source: SourceConfig) -> list[InputFile]:
    """The files of a source in a fixed order, each once. Raises `UserError` for what is missing or unreadable."""
    directories = source.kind is SourceKind.docstrings
    paths = source.paths or sorted({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    found: dict[str, None] = {}  # real path, so that nothing is read twice; a dict keeps the order
    for pattern in paths:
        if source.kind is SourceKind.hub:
            found.setdefault(pattern)
        elif is_remote(pattern) and not directories:
            remote = remote_matches(pattern)
            if not remote:
                raise UserError(f"source.paths: {pattern}: no such file; correct the URL")
            found |= dict.fromkeys(remote)
        else:
            matches = _python_files(Path(pattern)) if directories else _matches(pattern)
            found |= dict.fromkeys(str(match.resolve()) for match in matches)
    if source.kind is SourceKind.hub:
        return [
            InputFile(name, size.text_bytes, version, size.text_bytes, size.units)
            for name in found
            for size, version in (hub_size(name),)
        ]
    files = _measured(list(found), directories)
    if source.kind is SourceKind.parquet:
        sizes = [parquet_size(file.path, source.field) for file in files]
        files = [file._replace(**size._asdict()) for file, size in zip(files, sizes, strict=True)]
    return files


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise UserError(f"source.paths: {path} is a directory; name its files, for instance {path}/*.txt")
    if path.exists():
        matches = [path]
    else:  # `**` of pathlib does not follow links to directories, hence no loops
        matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        matches = [match for match in matches if not match.name.startswith(".") or path.name.startswith(".")]
    files = [match for match in matches if match.is_file()]
    if not files:
        what = "not a regular file" if matches else "no such file"
        raise UserError(f"source.paths: {pattern}: {what} (looked from {Path.cwd()}); correct the path")
    return files


def _python_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"source.paths: {directory}: no such directory of Python code; correct the path")
    files: list[Path] = []
    for folder, names, filenames in os.walk(directory):
        passed_over = _NO_PROSE if Path(folder) != directory else (*_NO_PROSE, "site-packages")
        names[:] = sorted(name for name in names if name not in passed_over)
        files += [Path(folder, name) for name in sorted(filenames) if name.endswith(".py")]
    return files


def _measured(paths: Sequence[str], code: bool) -> list[InputFile]:
    files: list[InputFile] = []
    stored = text = 0
    for path in paths:
        try:
            size, version = stamp(path)
            if not is_remote(path) and not os.access(path, os.R_OK):
                raise PermissionError(13, "permission denied")
            compressed = Path(path).suffix in _DECOMPRESSORS
            text_bytes = size // _DOCSTRING_SHARE if code else size
            if compressed and len(files) < _MEASURED_FILES:
                text_bytes = _estimated_text_bytes(path, size)
                stored, text = stored + size, text + text_bytes
            elif compressed:
                text_bytes = size * text // max(1, stored)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}); mend or leave out the file"
            ) from error
        files.append(InputFile(path, size, version, text_bytes, size))
    return files


def _estimated_text_bytes(path: str, stored_bytes: int) -> int:
    """The decompressed size, from how the first MiB of it compressed."""
    fed_bytes = produced_bytes = 0
    for chunk in _decompressed(path):
        fed_bytes = min(stored_bytes, chunk.stored + _FEED_BYTES)
        produced_bytes += len(chunk.data)
        if produced_bytes >= 2**20:
            break
    return produced_bytes * stored_bytes // max(1, fed_bytes)


# -- tasks ----------------------------------------------------------------------------------------------------------


def split(files: Sequence[InputFile], source: SourceConfig) -> list[list[Span]]:
    """Tasks that together cover every file once, each of some MiB of text, whatever the number of workers."""
    total = sum(file.text_bytes for file in files)
    task_bytes = min(_MAX_TASK_BYTES, max(_MIN_TASK_BYTES, total // _TASKS))
    tasks: list[list[Span]] = []
    room = 0
    for index, file in enumerate(files):
        pieces = _num_pieces(file, source, task_bytes)
        borders = [file.units * piece // pieces for piece in range(pieces + 1)]
        for begin, end in pairwise(borders):
            if room <= 0:
                tasks.append([])
                room = task_bytes
            tasks[-1].append(Span(index, begin, end))
            room -= file.text_bytes // pieces
    return tasks


def _num_pieces(file: InputFile, source: SourceConfig, task_bytes: int) -> int:
    whole = source.kind is SourceKind.docstrings or (
        source.kind is SourceKind.text and source.document is DocumentBoundary.file
    )
    wanted = 1 if whole else max(1, -(-file.text_bytes // task_bytes))
    most = _MOST_TASKS.get(Path(file.path).suffix, wanted)
    if source.kind is SourceKind.wikidump and wanted > most and is_multistream(file.path):
        most = wanted
    return min(wanted, most, max(1, file.units))


# -- reading --------------------------------------------------------------------------------------------------------


def read(files: Sequence[InputFile], spans: Sequence[Span], source: SourceConfig) -> Iterator[Document | Bad]:
    """The documents of a task in order. Raises `UserError` for a file that changed or cannot be decompressed."""
    for span in spans:
        file = files[span.file]
        try:
            if source.kind is not SourceKind.hub and stamp(file.path) != (file.bytes, file.version):
                raise changed(file.path)
            if source.kind is SourceKind.docstrings:
                yield from _docstrings(file.path)
            elif source.kind in (SourceKind.parquet, SourceKind.hub):
                yield from _rows(file, span, source)
            elif source.kind is SourceKind.wikidump:
                yield from _articles(file.path, span)
            elif source.kind is SourceKind.jsonl:
                yield from _json_lines(_Lines(file.path, span), span.file, source.field)
            else:
                yield from _texts(_Lines(file.path, span), span.file, source.document)
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read ({error}); mend or leave out the file") from error


def _rows(file: InputFile, span: Span, source: SourceConfig) -> Iterator[Document | Bad]:
    if source.kind is SourceKind.parquet:
        rows = parquet_rows(file.path, span.begin, span.end, source.field)
    else:
        rows = hub_rows(file.path, span.begin, span.end, source.field, file.version)
    for number, value in rows:
        location = f"{file.path}, row {number}"
        if isinstance(value, str):
            yield Document(value, location, _origin(span.file, number), False)
        else:
            yield Bad("no_text_field", location)


def _articles(path: str, span: Span) -> Iterator[Document | Bad]:
    if Path(path).suffix == ".bz2" and is_multistream(path):
        found = pages(stream_lines(path, span.begin, span.end), lambda _: True)
    else:
        lines = _Lines(path, span)
        found = pages(lines, lines.owns)
    for offset, page in found:
        location = f"{path}, span {span.begin}, byte {offset}"
        if page.left_out:
            yield Bad(page.left_out, location)
        else:
            yield Document(page.text, location, _origin(f"{span.file} {span.begin}", offset), False)


def _json_lines(lines: "_Lines", file: int, field: str) -> Iterator[Document | Bad]:
    begins = True
    for offset, line in lines:
        goes_on, begins = not begins, line.endswith(b"\n")
        if goes_on or not line.strip():
            continue
        if not lines.owns(offset):
            return
        location = f"{lines.path}, byte {offset}"
        if len(line) >= MAX_LINE_BYTES:
            yield Bad("line_too_long", location)
            continue
        text, repaired = _decoded(line)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            yield Bad("bad_json", location)
            continue
        content = value.get(field) if isinstance(value, dict) else None
        if isinstance(content, str):
            yield Document(content, location, _origin(file, offset), repaired)
        else:
            yield Bad("no_text_field", location)


def _texts(lines: "_Lines", file: int, boundary: DocumentBoundary) -> Iterator[Document]:
    """Runs of lines between blank ones, or whole files. A document belongs to the span of the blank line before it."""
    by_blank_line = boundary is DocumentBoundary.blank_line
    part: list[bytes] = []
    part_bytes = start = 0
    inside = between = False  # inside a document that is ours; between two documents
    for offset, line in lines:
        if offset == 0:
            inside = between = lines.owns(0)
        if by_blank_line and not line.strip():
            if part:
                yield _text_document(part, lines.path, file, start)
            part, part_bytes = [], 0
            inside = between = lines.owns(offset)
            if not inside:
                return
        elif inside:
            start, between = offset if between else start, False
            part.append(line)
            part_bytes += len(line)
            if part_bytes >= PART_BYTES:
                yield _text_document(part, lines.path, file, start)
                part, part_bytes = [], 0
    if part:
        yield _text_document(part, lines.path, file, start)


def _text_document(lines: Sequence[bytes], path: str, file: int, offset: int) -> Document:
    text, repaired = _decoded(b"".join(lines))
    return Document(text, f"{path}, byte {offset}", _origin(file, offset), repaired)


def _docstrings(path: str) -> Iterator[Document | Bad]:
    """The docstrings of one Python file, read with `ast` and never imported."""
    code = Path(path).read_bytes()
    if b'"""' not in code and b"'''" not in code:
        return  # as good as surely without docstrings worth reading, and parsing is slow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield Bad("unparsable", path)
        return
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                line = node.body[0].lineno
                yield Document(_prose(cleandoc(text)), f"{path}:{line}", _origin(path, line), False)
        for branch in ("body", "orelse", "handlers", "finalbody", "cases"):  # expressions hold no docstrings
            todo += getattr(node, branch, ())


def _prose(docstring: str) -> str:
    """Without lines of code (doctests) and rulers, which no one reads as sentences."""
    lines = docstring.split("\n")
    kept = [
        line
        for line in lines
        if not line.lstrip().startswith((">>>", "... ")) and (any(map(str.isalnum, line)) or not line.strip())
    ]
    return "\n".join(kept)


def _decoded(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def _origin(file: int | str, offset: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{file}:{offset}".encode(), digest_size=8).digest(), "little")


class _Lines:
    """The lines of a file from the first that begins in `span` to the end of the file, each with its offset.

    Offsets are those of the decompressed text. The reader goes past the span's end as far as it must, and asks `owns`.
    A line longer than `MAX_LINE_BYTES` comes in pieces of that size, the last piece aside.
    """

    def __init__(self, path: str, span: Span) -> None:
        self.path = path
        self._span = span
        self._compressed = _Decompressed(path, span) if Path(path).suffix in _DECOMPRESSORS else None

    def owns(self, offset: int) -> bool:
        """Whether a line that has been read, and begins at `offset`, begins in the span."""
        return offset < (self._span.end if self._compressed is None else self._compressed.end)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        file: BinaryIO
        if self._compressed is not None:
            offset, before = self._compressed.skip()
            file = io.BufferedReader(self._compressed, 2**16)
        else:
            file = open_input(self.path)
            offset = self._span.begin
            file.seek(max(0, offset - 1))
            before = file.read(1) if offset else b""
        with file:
            begins = before in (b"", b"\n")
            while line := file.readline(MAX_LINE_BYTES):
                if begins:
                    yield offset, line
                begins = begins or line.endswith(b"\n")
                offset += len(line)


class _Chunk(NamedTuple):
    stored: int  # offset of the stored bytes that it came out of
    offset: int  # of its first byte in the decompressed text
    before: bytes  # the byte before that one; b"" at the start
    data: bytes


class _Pass:
    """One way through a compressed file, that a later span can go on with."""

    latest: ClassVar["_Pass | None"] = None  # of this process: spans mostly come in ascending order

    def __init__(self, path: str) -> None:
        self._file = (path, *stamp(path))
        self._chunks = _decompressed(path)
        self._left = 0  # where the last span ended, in stored bytes
        self._again: deque[_Chunk] = deque()  # chunks past it, read already

    @classmethod
    def reaching(cls, path: str, stored: int) -> "_Pass":
        """A pass that has not come by the stored offset `stored` yet. No one else gets it until it is `left`."""
        found, cls.latest = cls.latest, None
        if found is not None and found._left <= stored and found._file == (path, *stamp(path)):
            return found
        return cls(path)

    def leave(self, stored: int, again: Sequence[_Chunk]) -> None:
        """Let a span from `stored` on have the pass, and `again` the chunks past that which have been read."""
        self._left = stored
        self._again.extendleft(reversed(again))
        _Pass.latest = self

    def __next__(self) -> _Chunk:
        return self._again.popleft() if self._again else next(self._chunks)

    def __iter__(self) -> Iterator[_Chunk]:
        return self


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of a file from a span on, and where the end of the span lies among them."""

    def __init__(self, path: str, span: Span) -> None:
        self.end = 2**63  # offset of the first byte past the span, as soon as that has been read
        self._span = span
        self._pass = _Pass.reaching(path, span.begin)
        self._beyond: list[_Chunk] = []  # what has been read past the span
        self._pending = memoryview(b"")

    def skip(self) -> tuple[int, bytes]:
        """Drop what comes before the span; return where that leaves us and the byte before (b"" at the start)."""
        for chunk in self._pass:
            if chunk.stored >= self._span.begin:
                self._take(chunk)
                return chunk.offset, chunk.before
        return 0, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            chunk = next(self._pass, None)
            if chunk is None:
                return 0
            self._take(chunk)
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._pass.leave(self._span.end, self._beyond)
        super().close()

    def _take(self, chunk: _Chunk) -> None:
        if chunk.stored >= self._span.end:
            self.end = min(self.end, chunk.offset)
            self._beyond.append(chunk)
        self._pending = memoryview(chunk.data)


def _decompressed(path: str) -> Iterator[_Chunk]:
    """The whole file. Members and frames that follow one another are one stream."""
    make = _DECOMPRESSORS[Path(path).suffix]
    stream = None
    position = offset = 0
    before = b""
    try:
        with open_input(path) as file:
            while data := file.read(_FEED_BYTES):
                produced: list[bytes] = []
                stored, position = position, position + len(data)
                while data:
                    if stream is None:
                        data = data.lstrip(b"\0")  # padding between or after members
                        if not data:
                            break
                        stream = make()
                    produced.append(stream.decompress(data))
                    data = stream.unused_data if stream.eof else b""
                    stream = None if stream.eof else stream
                text = b"".join(produced)
                yield _Chunk(stored, offset, before, text)
                offset += len(text)
                before = text[-1:] or before
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); restore or leave out the file") from error
    if stream is not None:
        raise UserError(f"{path}: ends in the middle of its compressed data; restore or leave out the file")
