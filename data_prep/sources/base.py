"""What a source is: input -> documents, in tasks of similar size that can be read apart.

A task is a list of spans: of stored bytes, or of what else a file counts in. An item belongs to the span in which it
begins, so every one is read once. Knows nothing of what becomes of a document.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from cloze.errors import UserError
from cloze.schema import Variant, doc

_TASKS, _MOST_TASKS = 128, 4096  # wanted, within the bounds that follow; and at most, whatever the size
_MIN_TASK_BYTES, _MAX_TASK_BYTES = 2**20, 64 * 2**20  # of text


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


class Look(NamedTuple):
    """What a source's sample showed."""

    source: "Source"  # the same, with what `auto` stands for in it
    sentences: str  # where they end, if that is `auto`: "rules" or "lines"


@dataclass(frozen=True, kw_only=True)
class Source(Variant, ABC):
    """Where documents come from. A kind is a subclass, `class MySource(Source, kind="mine")`, in a module beside this.

    Its fields are its keys (`source=mine source.paths=[…]`), with values in conf/source/mine.yaml.
    """

    malformed: ClassVar[frozenset[str]] = frozenset()  # reasons of `Bad` that count towards max_bad_fraction
    needs_paths: ClassVar[bool] = True
    library: ClassVar[str | None] = None  # distribution that the documents depend on: its version belongs to the plan

    paths: list[str] = doc("files, globs or URLs")
    min_characters: int = doc("documents with fewer characters are dropped")
    max_bad_fraction: float = doc("share of malformed items above which the run stops")
    weight: float = doc(
        "how often a pass holds each training document: 1 once, 0.5 every other one, 2.5 two or three times"
    )

    def __post_init__(self) -> None:
        self._require(
            bool(self.paths) or not self.needs_paths, "paths: empty; name files or globs: source.paths=[a.txt]"
        )
        self._require(all(isinstance(path, str) for path in self.paths), f"paths={self.paths}: a list within a list")
        self._require(self.min_characters >= 0, f"min_characters={self.min_characters}: cannot be negative")
        self._require(0 < self.weight <= 100, f"weight={self.weight}: must be above 0 and at most 100")
        self._require(0 <= self.max_bad_fraction <= 1, f"max_bad_fraction={self.max_bad_fraction}: must be in [0, 1]")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"source.{message}")

    # What a kind must say, and may

    @abstractmethod
    def find_inputs(self) -> list[InputFile]:
        """The files in a fixed order, each once. Raises `UserError` for what is missing or unreadable."""

    @abstractmethod
    def documents(self, file: InputFile, span: Span) -> Iterator[Document | Bad]:
        """What begins in a span, in order. `OSError` becomes one line that names the file."""

    def num_pieces(self, file: InputFile, task_bytes: int) -> int:
        """Into how many spans a file is cut: of about `task_bytes` of text each, unless it can be cut less often."""
        return min(max(1, -(-file.text_bytes // task_bytes)), max(1, file.units))

    def looked_at(self, files: Sequence[InputFile]) -> Look:
        """Looks at a sample before anything is planned: decides what is `auto`, tells of it, warns.

        The same files make the same decision. Raises `UserError` where the sample shows that the source is unfit.
        """
        return Look(self, "rules")

    def check(self, file: InputFile) -> None:
        """Called before and after a span is read. Raises `UserError` if the file is no longer what was planned with."""

    # What follows from that

    def split(self, files: Sequence[InputFile]) -> list[list[Span]]:
        """Tasks that together cover every file once, each of some MiB of text, whatever the number of workers."""
        total = sum(file.text_bytes for file in files)
        task_bytes = max(min(_MAX_TASK_BYTES, max(_MIN_TASK_BYTES, total // _TASKS)), total // _MOST_TASKS)
        tasks: list[list[Span]] = []
        room = 0
        for index, file in enumerate(files):
            pieces = self.num_pieces(file, task_bytes)
            borders = [file.units * piece // pieces for piece in range(pieces + 1)]
            for begin, end in pairwise(borders):
                if room <= 0:
                    tasks.append([])
                    room = task_bytes
                tasks[-1].append(Span(index, begin, end))
                room -= file.text_bytes // pieces
        return tasks

    def read(self, files: Sequence[InputFile], spans: Sequence[Span]) -> Iterator[Document | Bad]:
        """The documents of a task in order. Raises `UserError` for a file that changed or cannot be decompressed."""
        for span in spans:
            file = files[span.file]
            try:
                self.check(file)
                yield from self.documents(file, span)
                self.check(file)  # it may have changed under our hands
            except OSError as error:
                raise UserError(f"{file.path}: cannot be read ({error}); mend or leave out the file") from error


def origin(file: int | str, offset: int) -> int:
    """A document's number, the same wherever and whenever it is read."""
    return int.from_bytes(hashlib.blake2b(f"{file}:{offset}".encode(), digest_size=8).digest(), "little")
