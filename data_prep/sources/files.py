"""Input files -> documents, in tasks of similar size that can be read apart.

A task is a list of spans of stored bytes (of Parquet files row groups, of data sets shards). An item belongs to the
span in which it begins, so every one is read once. A compressed file is decompressed from its start by every task that
has a span of it (lines.py): `_TASKS_OF_A_FILE` keeps that cheap next to encoding in the worst case; a corpus of many
files has no such limit.

Knows formats and files; knows nothing of what becomes of a document.
"""

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from inspect import cleandoc
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

from cloze.errors import UserError
from cloze.storage import changed, is_remote, local_path, remote_matches, stamp
from data_prep.config import DocumentBoundary, SourceConfig, SourceKind
from data_prep.sources.lines import MAX_LINE_BYTES, Line, compression, decompressed, lines
from data_prep.sources.tables import hub_rows, hub_size, parquet_rows, parquet_size
from data_prep.sources.wiki import is_multistream, pages, stream_lines

PART_BYTES = 4 * 2**20  # a longer text is handed on in parts

_MEASURED_FILES = 64  # compressed files whose ratio is measured; the others are taken for their like
_TASKS, _MOST_TASKS = 128, 4096  # wanted, within the bounds that follow; and at most, whatever the size
_MIN_TASK_BYTES, _MAX_TASK_BYTES = 2**20, 64 * 2**20  # of text
_NO_PROSE = ("__pycache__", "test", "tests")  # directories of code with next to no docstrings
_DOCSTRING_SHARE = 8  # one byte in about so many of Python code is docstring

_UTF_8_MARK = b"\xef\xbb\xbf"
_MARKS = {  # first bytes of what only calls itself text, and the reason to leave it out
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"), "utf_16_or_32"),
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\3\4"), "compressed"),
    b"%PDF-": "pdf",
}
FOREIGN = sorted(set(_MARKS.values()))
_TASKS_OF_A_FILE = {".gz": 16, ".zst": 32, ".xz": 8, ".bz2": 4}  # the slower to decompress, the fewer


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
            try:
                matches = _python_files(local_path(pattern)) if directories else _matches(pattern)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"source.paths: {pattern:.99}: {reason}; correct the path or the pattern") from error
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
    path = local_path(pattern)
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
            compressed = bool(compression(path))
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
    produced = 0
    for chunk in decompressed(path):
        if produced >= 2**20 and chunk.place:
            return produced * stored_bytes // chunk.place  # all that came out of what lies before it
        produced += len(chunk.data)
    return produced


# -- tasks ----------------------------------------------------------------------------------------------------------


def split(files: Sequence[InputFile], source: SourceConfig) -> list[list[Span]]:
    """Tasks that together cover every file once, each of some MiB of text, whatever the number of workers."""
    total = sum(file.text_bytes for file in files)
    task_bytes = max(min(_MAX_TASK_BYTES, max(_MIN_TASK_BYTES, total // _TASKS)), total // _MOST_TASKS)
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
    most = _TASKS_OF_A_FILE.get(compression(file.path), wanted)
    if source.kind is SourceKind.wikidump and wanted > most and is_multistream(file.path):
        most = wanted
    return min(wanted, most, max(1, file.units))


# -- reading --------------------------------------------------------------------------------------------------------


def read(files: Sequence[InputFile], spans: Sequence[Span], source: SourceConfig) -> Iterator[Document | Bad]:
    """The documents of a task in order. Raises `UserError` for a file that changed or cannot be decompressed."""
    for span in spans:
        file = files[span.file]
        try:
            _check(file, source)
            yield from _items(file, span, source)
            _check(file, source)  # it may have changed under our hands
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read ({error}); mend or leave out the file") from error


def _check(file: InputFile, source: SourceConfig) -> None:
    if source.kind is not SourceKind.hub and stamp(file.path) != (file.bytes, file.version):
        raise changed(file.path)


def _items(file: InputFile, span: Span, source: SourceConfig) -> Iterator[Document | Bad]:
    if source.kind is SourceKind.docstrings:
        return _docstrings(file.path)
    if source.kind in (SourceKind.parquet, SourceKind.hub):
        return _rows(file, span, source)
    if source.kind is SourceKind.wikidump:
        return _articles(file.path, span)
    found = lines(file.path, span.begin, span.end)
    if span.begin == 0 < span.end and (first := next(found, None)):
        if what := next((what for mark, what in _MARKS.items() if first[2].startswith(mark)), None):
            return iter([Bad(what, f"{file.path}, byte 0")])
        place, offset, line, goes_on = first
        found = chain([(place, offset, line.removeprefix(_UTF_8_MARK), goes_on)], found)
    if source.kind is SourceKind.jsonl:
        return _json_lines(found, file.path, span, source.field)
    return _texts(found, file.path, span, source.document)


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
    found = stream_lines(path, span.begin) if is_multistream(path) else lines(path, span.begin, span.end)
    for offset, page in pages(found, span.end):
        location = f"{path}, span {span.begin}, byte {offset}"
        if page.left_out:
            yield Bad(page.left_out, location)
        else:
            yield Document(page.text, location, _origin(f"{span.file} {span.begin}", offset), False)


def _json_lines(found: Iterable[Line], path: str, span: Span, field: str) -> Iterator[Document | Bad]:
    for place, offset, line, goes_on in found:
        if goes_on or not line.strip():
            continue
        if place >= span.end:
            return
        location = f"{path}, byte {offset}"
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
            yield Document(content, location, _origin(span.file, offset), repaired)
        else:
            yield Bad("no_text_field", location)


def _texts(found: Iterable[Line], path: str, span: Span, boundary: DocumentBoundary) -> Iterator[Document]:
    """Runs of lines between blank ones, or whole files. A document belongs to the span of the blank line before it."""
    by_blank_line = boundary is DocumentBoundary.blank_line
    part: list[bytes] = []
    part_bytes = start = 0
    inside = between = False  # inside a document that is ours; between two documents

    def document() -> Document:
        text, repaired = _decoded(b"\n".join(part))
        return Document(text, f"{path}, byte {start}", _origin(span.file, start), repaired)

    for place, offset, line, _ in found:
        if offset == 0:
            inside = between = place < span.end
        if by_blank_line and not line.strip():
            if part:
                yield document()
            part, part_bytes = [], 0
            inside = between = place < span.end
            if not inside:
                return
        elif inside:
            start, between = offset if between else start, False
            part.append(line)
            part_bytes += len(line)
            if part_bytes >= PART_BYTES:
                yield document()
                part, part_bytes = [], 0
    if part:
        yield document()


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
