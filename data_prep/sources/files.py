"""Sources of files: paths, globs and URLs -> files with their sizes, plain or compressed; and lines of text in them.

A compressed file is decompressed from its start by every task that has a span of it (lines.py): `_TASKS_OF_A_FILE`
keeps that cheap next to encoding in the worst case; a corpus of many files has no such limit.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cloze.encodings import UTF_8, UTF_8_MARK, codec_named, codec_of, escaped, guessed, to_utf_8, unit_of
from cloze.errors import UserError
from cloze.log import log
from cloze.schema import doc
from cloze.storage import changed, is_remote, local_path, remote_matches, stamp
from data_prep.sources.base import Bad, InputFile, Look, Source, Span
from data_prep.sources.lines import Line, compression, decompressed, head, lines

_MEASURED_FILES = 64  # compressed files whose ratio is measured; the others are taken for their like
_TASKS_OF_A_FILE = {".gz": 16, ".zst": 32, ".xz": 8, ".bz2": 4}  # the slower to decompress, the fewer
_SAMPLED_FILES, _SAMPLED_BYTES = 32, 2**16  # that are looked at before anything is read, and bytes of each place
_MOST_NOT_DECODED = 0.5  # share of the lines looked at from which an encoding is taken for the wrong one
_MARKS = {  # first bytes of what only calls itself text, and the reason to leave it out
    **dict.fromkeys((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"PK\3\4"), "compressed"),
    **dict.fromkeys((b"\x1f\x9d", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18", b"]\0\0"), "compressed"),
    b"%PDF-": "pdf",
}
FOREIGN = frozenset(_MARKS.values())
_ADVICE = {
    "compressed": "unpack it, or let its name end in .gz, .zst, .xz or .bz2",
    "pdf": "take the text out of it first, with pdftotext",
}


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


@dataclass(frozen=True, kw_only=True)
class EncodedSource(FileSource):
    """Base of the sources that read files of text, in any encoding that Python knows."""

    encoding: str = doc(
        "of the files: auto (byte order mark, else UTF-8), utf-8, gb18030, latin-1, … as Python names it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(
            self.encoding == "auto" or codec_named(self.encoding) is not None,
            f"encoding={self.encoding}: no encoding of text that Python knows; write auto, utf-8, gb18030, latin-1, …",
        )

    def lines(self, file: InputFile, span: Span) -> Iterator[Line] | Bad:
        """The lines from the first that begins in `span` on, in UTF-8, no byte order marks; or why it is no text."""
        start = head(file.path, 8)
        if span.begin == 0 < span.end and (
            what := next((w for mark, w in _MARKS.items() if start.startswith(mark)), "")
        ):
            return Bad(what, f"{file.path}, byte 0: {_ADVICE[what]}")
        codec = codec_of(start, self.encoding)
        return _readable(lines(file.path, span.begin, span.end, unit_of(codec)), codec)

    def sampled(self, files: Sequence[InputFile]) -> Iterator[tuple[InputFile, list[bytes]]]:
        """Some files, from all over the source, each with lines from its beginning, middle and end; no foreign ones."""
        full = [file for file in files if file.bytes]
        for file in full[:: max(1, len(full) // _SAMPLED_FILES)][:_SAMPLED_FILES]:
            places = 1 if compression(file.path) or file.bytes < 4 * _SAMPLED_BYTES else 3
            found: list[bytes] = []
            for number in range(places):
                begin = file.units * number // places
                some = self.lines(file, Span(0, begin, file.units))
                if isinstance(some, Bad):
                    break
                size = 0
                for _, _, line, _ in some:
                    found.append(_beginning(line))
                    size += len(line) + 1
                    if size >= _SAMPLED_BYTES:
                        break
            yield file, found

    def looked_at(self, files: Sequence[InputFile]) -> Look:
        """Warns of text that is in another encoding, and refuses it where most lines are."""
        for file, found in self.sampled(files):
            self._check_encoding(file, found)
        return super().looked_at(files)

    def _check_encoding(self, file: InputFile, found: Sequence[bytes]) -> None:
        full = [line for line in found if line.strip()]
        wrong = [line for line in full if b"\0" in line or escaped(line) or decoded(line)[1]]
        if not wrong:
            return
        start = head(file.path, _SAMPLED_BYTES)
        codec = codec_of(start, self.encoding)
        guess = guessed(wrong, start) if codec == UTF_8 else None  # of what could not be read nothing is left
        told = f"{file.path}: {len(wrong):,} of {len(full):,} lines looked at are no {codec}"
        remedy = f"it looks like {guess}: source.encoding={guess}" if guess else "set source.encoding to what it is in"
        if guess and len(wrong) > _MOST_NOT_DECODED * len(full):
            raise UserError(f"{told}; {remedy}")
        log.warning(f"{told}, and lose letters; {remedy}")


def _beginning(line: bytes) -> bytes:
    """At most so many bytes of a line as are looked at, no letter cut in two."""
    end = _SAMPLED_BYTES
    while len(line) > end > _SAMPLED_BYTES - 4 and line[end] & 0xC0 == 0x80:  # goes on with a letter in UTF-8
        end -= 1
    return line[:end]


def _readable(found: Iterable[Line], codec: str) -> Iterator[Line]:
    """Lines in UTF-8, without the byte order marks that `cat` leaves at their beginnings."""
    for place, offset, line, goes_on in found:
        text = line if codec == UTF_8 else to_utf_8(line, codec)
        while text.startswith(UTF_8_MARK):
            text = text.removeprefix(UTF_8_MARK)
        yield place, offset, text, goes_on


def decoded(data: bytes) -> tuple[str, bool]:
    """The text of UTF-8 bytes, and whether something in them had to be replaced.

    Surrogates of their own, as Java and Oracle write them, stay: `repair` joins them.
    """
    for errors in ("strict", "surrogatepass"):
        with suppress(UnicodeDecodeError):
            return data.decode(errors=errors), False
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
