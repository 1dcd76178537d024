"""Minimal pairs as they are published: files, folders and zip archives -> paradigms of (good, bad) sentences.

BLiMP's and SLING's JSON lines, Zorro's text files (two lines a pair), SLING's text files (`good@@@bad`), TSV and CSV. A
bad line is one `UserError` with file and line. Knows neither tokenizers nor models.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloze.errors import UserError

SUFFIXES = (".jsonl", ".txt", ".tsv", ".csv")
GOOD, BAD = "sentence_good", "sentence_bad"  # BLiMP's names, in JSON and as headers of tables
_NAME_KEYS = ("UID", "paradigm")  # BLiMP's, SLING's
_PHENOMENON_KEYS = ("linguistics_term", "phenomenon")
_SLING_SEPARATOR = "@@@"


class Pair(NamedTuple):
    """A grammatical sentence and an ungrammatical one that differs from it as little as can be."""

    good: str
    bad: str
    place: str  # file and line, for messages


class Paradigm(NamedTuple):
    """Pairs that show one contrast."""

    name: str
    phenomenon: str  # several paradigms: "subject_verb_agreement"; "" where nothing tells
    field: str  # several phenomena: "morphology"; "" where nothing tells
    pairs: list[Pair]

    @property
    def is_agreement(self) -> bool:
        """Whether it is about agreement, which word frequencies decide least."""
        return "agreement" in f"{self.phenomenon} {self.name}".lower()


class _Line(NamedTuple):
    """What one line of a file says."""

    pair: Pair
    about: Mapping[str, Any]  # its other columns


def read_paradigms(
    sources: Sequence[str], *, most: int = 0, bad_first: bool = True, key: str = "data"
) -> list[Paradigm]:
    """The paradigms of these files, folders and zip archives, in their order, each with at most `most` pairs (0: all).

    Of more pairs, `most` are taken at even distances: the same ones every time. `bad_first` says which of two alternate
    lines is the ungrammatical one. Raises `UserError` for what cannot be read, is malformed, or holds no pairs.
    """
    found: dict[str, Paradigm] = {}
    for source in sources:
        for path, data in _files(Path(source), key):
            for paradigm in _paradigms(path, _text(data, path), bad_first):
                name = paradigm.name if paradigm.name not in found else f"{path.parent.name}/{paradigm.name}"
                if name in found:
                    raise UserError(f"{key}={source}: {path}: a second paradigm called {name}; rename the file")
                found[name] = paradigm._replace(name=name, pairs=_spread(paradigm.pairs, most))
    return list(found.values())


def _spread(pairs: list[Pair], most: int) -> list[Pair]:
    if not most or len(pairs) <= most:
        return pairs
    return [pairs[i] for i in (np.arange(most) * len(pairs) // most).tolist()]


def _files(source: Path, key: str) -> Iterator[tuple[Path, bytes]]:
    """(path, content) of a file, or of the files with pairs in a folder or an archive, by name."""
    try:
        if source.is_dir():
            paths = [path for path in sorted(source.rglob("*")) if path.is_file() and _may_hold_pairs(path)]
            yield from ((path, path.read_bytes()) for path in paths)
        elif source.suffix.lower() == ".zip":
            with zipfile.ZipFile(source) as archive:
                paths = [Path(name) for name in sorted(archive.namelist()) if _may_hold_pairs(Path(name))]
                yield from ((source / path, archive.read(path.as_posix())) for path in paths)
        elif source.suffix.lower() in SUFFIXES:
            paths = [source]
            yield source, source.read_bytes()
        else:
            paths = []
    except FileNotFoundError:
        raise UserError(f"{key}={source}: no such file or folder; name one with minimal pairs") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}={source}: cannot be read ({error}); restore the file") from error
    if not paths:
        raise UserError(f"{key}={source}: holds no minimal pairs; they are read from {' '.join(SUFFIXES)} and .zip")


def _may_hold_pairs(path: Path) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not path.stem.lower().startswith(("readme", "license"))


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {number}: not UTF-8; save the file as UTF-8") from None


def _paradigms(path: Path, text: str, bad_first: bool) -> list[Paradigm]:
    """By name, in the order of their first pair."""
    found: dict[str, Paradigm] = {}
    for pair, about in _read(path, text, bad_first):
        name = _first(about, _NAME_KEYS) or path.stem
        by_file, dash, _ = path.stem.partition("-")  # Zorro's files are called phenomenon-paradigm.txt
        phenomenon = _first(about, _PHENOMENON_KEYS) or (by_file if dash else "")
        paradigm = found.setdefault(name, Paradigm(name, phenomenon, _first(about, ("field",)), []))
        paradigm.pairs.append(pair)
    if not found:
        raise UserError(f"{path}: holds no minimal pairs; leave it out")
    return list(found.values())


def _first(about: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The first name there is; BLiMP writes a field both as syntax_semantics and as syntax/semantics."""
    return next((str(about[key]).strip().replace("/", "_") for key in keys if about.get(key)), "")


def _read(path: Path, text: str, bad_first: bool) -> Iterator[_Line]:
    suffix, lines = path.suffix.lower(), re.split(r"\r\n|\r|\n", text)
    while lines and not lines[-1].strip():
        lines.pop()
    if suffix == ".jsonl":
        return _json_lines(path, lines)
    if suffix == ".csv":
        return _table(path, ((number, cells) for number, cells in _csv_rows(path, text) if cells))
    first = next((line for line in lines if line.strip()), "")
    if suffix == ".tsv" or "\t" in first:
        return _table(path, ((number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()))
    if _SLING_SEPARATOR in first:
        rows = ((number, line.split(_SLING_SEPARATOR)) for number, line in enumerate(lines, 1) if line.strip())
        return _table(path, rows)
    return _alternate_lines(path, lines, bad_first)


def _line(path: Path, number: int, good: Any, bad: Any, about: Mapping[str, Any]) -> _Line:
    place = f"{path}: line {number}"
    for name, side in ((GOOD, good), (BAD, bad)):
        if not isinstance(side, str) or not side.strip():
            raise UserError(f"{place}: its {name} is {'empty' if side in ('', None) else repr(side)[:40]}; mend it")
    return _Line(Pair(good.strip(), bad.strip(), place), about)


def _json_lines(path: Path, lines: Sequence[str]) -> Iterator[_Line]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not JSON ({error}); mend it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: not a JSON object with {GOOD} and {BAD}; mend it")
        _require_columns(path, number, list(row))
        yield _line(path, number, row[GOOD], row[BAD], row)


def _require_columns(path: Path, number: int, names: Sequence[str]) -> None:
    if missing := [name for name in (GOOD, BAD) if name not in names]:
        raise UserError(f"{path}: line {number}: no {' and no '.join(missing)}; it has {', '.join(names)[:80] or '{}'}")


def _table(path: Path, rows: Iterable[tuple[int, list[str]]]) -> Iterator[_Line]:
    """With a header that names the columns, or two columns, the good sentence first."""
    header = [GOOD, BAD]
    for index, (number, cells) in enumerate(rows):
        if index == 0 and {GOOD, BAD} & {cell.strip() for cell in cells}:
            header = [cell.strip() for cell in cells]
            _require_columns(path, number, header)
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}: line {number}: {len(cells)} columns, not {len(header)}: {', '.join(header)}")
        row = dict(zip(header, cells, strict=True))
        yield _line(path, number, row[GOOD].strip(), row[BAD].strip(), row)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        yield from ((reader.line_num, cells) for cells in reader)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; mend it") from None


def _alternate_lines(path: Path, lines: Sequence[str], bad_first: bool) -> Iterator[_Line]:
    if len(lines) % 2:
        raise UserError(f"{path}: line {len(lines)}: an odd number of lines, and a pair is two of them; mend it")
    for number in range(0, len(lines), 2):
        first, second = (line.strip() for line in lines[number : number + 2])
        good, bad = (second, first) if bad_first else (first, second)
        empty = number + 1 + (not second and bool(first))  # the line that a message is about
        yield _line(path, empty, good, bad, {})
