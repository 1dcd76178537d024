"""Sources of files: paths, globs and URLs -> files with their sizes, plain or compressed; and lines of text in them.

A compressed file is decompressed from its start by every task that has a span of it (lines.py): `_TASKS_OF_A_FILE`
keeps that cheap next to encoding in the worst case; a corpus of many files has no such limit.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cloze.errors import UserError
from cloze.storage import changed, is_remote, local_path, remote_matches, stamp
from data_prep.sources.base import Bad, InputFile, Source, Span
from data_prep.sources.lines import Line, compression, decompressed, lines

_MEASURED_FILES = 64  # compressed files whose ratio is measured; the others are taken for their like
_TASKS_OF_A_FILE = {".gz": 16, ".zst": 32, ".xz": 8, ".bz2": 4}  # the slower to decompress, the fewer
_UTF_8_MARK = b"\xef\xbb\xbf"
_MARKS = {  # first bytes of what only calls itself text, and the reason to leave it out
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"), "utf_16_or_32"),
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\3\4"), "compressed"),
    b"%PDF-": "pdf",
}
FOREIGN = frozenset(_MARKS.values())


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Base of the sources that read files."""

    def find_inputs(self) -> list[InputFile]:
        """The files in a fixed order, each once. Raises `UserError` for what is missing or unreadable."""
        return self.measured(self.find_paths())

    def find_paths(self) -> list[str]:
        """What `paths` name: real paths, so that nothing is read twice, and URLs."""
        found: dict[str, None] = {}  # a dict keeps the order
        for pattern in self.paths:
            if is_remote(pattern):
                remote = remote_matches(pattern)
                if not remote:
                    raise UserError(f"source.paths: {pattern}: no such file; correct the URL")
                found |= dict.fromkeys(remote)
            else:
                found |= dict.fromkeys(resolved(pattern, _matches(pattern)))
        return list(found)

    def measured(self, paths: Sequence[str]) -> list[InputFile]:
        """The files with their sizes and versions."""
        files: list[InputFile] = []
        stored = text = 0
        for path in paths:
            try:
                size, version = stamp(path)
                if not is_remote(path) and not os.access(path, os.R_OK):
                    raise PermissionError(13, "permission denied")
                text_bytes = self.text_bytes(size)
                if compression(path) and len(files) < _MEASURED_FILES:
                    text_bytes = _estimated_text_bytes(path, size)
                    stored, text = stored + size, text + text_bytes
                elif compression(path):
                    text_bytes = size * text // max(1, stored)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be read ({error.strerror or error}); mend or leave out the file"
                ) from error
            files.append(InputFile(path, size, version, text_bytes, size))
        return files

    def text_bytes(self, size: int) -> int:
        """How much of a plain file of so many bytes is text."""
        return size

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """Few where every task decompresses the file anew."""
        pieces = super().num_pieces(file, task_bytes)
        return min(pieces, _TASKS_OF_A_FILE.get(compression(file.path), pieces))

    def check(self, file: InputFile) -> None:
        """Raises `UserError` where size or version is another one."""
        if stamp(file.path) != (file.bytes, file.version):
            raise changed(file.path)


def text_lines(file: InputFile, span: Span) -> Iterable[Line] | Bad:
    """The lines of a text file from the first that begins in `span` on; or why it is no text."""
    found = lines(file.path, span.begin, span.end)
    if span.begin == 0 < span.end and (first := next(found, None)):
        if what := next((what for mark, what in _MARKS.items() if first[2].startswith(mark)), None):
            return Bad(what, f"{file.path}, byte 0")
        place, offset, line, goes_on = first
        found = chain([(place, offset, line.removeprefix(_UTF_8_MARK), goes_on)], found)
    return found


def decoded(data: bytes) -> tuple[str, bool]:
    """The text of UTF-8 bytes, and whether something in them had to be replaced."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def resolved(pattern: str, matches: Iterable[Path]) -> Iterator[str]:
    """The real paths of what a pattern found. Raises `UserError` for one that cannot be looked at."""
    try:
        for match in matches:
            yield str(match.resolve())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"source.paths: {pattern:.99}: {reason}; correct the path or the pattern") from error


def _matches(pattern: str) -> Iterator[Path]:
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
    yield from files


def _estimated_text_bytes(path: str, stored_bytes: int) -> int:
    """The decompressed size, from how the first MiB of it compressed."""
    produced = 0
    for chunk in decompressed(path):
        if produced >= 2**20 and chunk.place:
            return produced * stored_bytes // chunk.place  # all that came out of what lies before it
        produced += len(chunk.data)
    return produced
