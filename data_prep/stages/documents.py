"""The documents of a map task: read, cleaned, judged, cut into sentences, and counted."""

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from data_prep.plan import Plan
from data_prep.sources.base import Bad
from data_prep.text.cleaning import filters_for, is_garbled, judge, repair
from data_prep.text.sentences import cut_by, split_sentences

MAX_DOCUMENT_CHARACTERS = 2**20  # a longer document is cut, at a sentence end, into documents that scatter apart

_NOT_TEXT = "not_text"


class Piece(NamedTuple):
    """A document, or a part of a long one, cleaned and cut into sentences."""

    sentences: list[str]
    digest: bytes  # 16 bytes
    side: int  # u64, of the document's first part: by it all of a document is held out, or trained on
    origin: int
    num_bytes: int
    location: str  # for messages: file and place


class Tally:
    """What became of the documents that a task read."""

    def __init__(self) -> None:
        self.read = self.bytes = self.bad = 0
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.first_bad: str | None = None

    def drop(self, reason: str, location: str, malformed: bool) -> None:
        """A document that is not kept; a malformed one counts towards max_bad_fraction."""
        self.dropped[reason] += 1
        if malformed:
            self.bad += 1
            self.first_bad = self.first_bad or f"{reason} at {location}"


def pieces(plan: Plan, task: int, tally: Tally) -> Iterator[Piece]:
    """The documents of a map task that are kept."""
    source = plan.sources[source_of(plan, task)]
    clean = plan.config.clean
    filters = filters_for(
        source.min_characters,
        clean.scripts,
        clean.min_script_share,
        clean.max_symbols,
        clean.max_repeated_lines,
    )
    cut = cut_by(plan.sentences[source_of(plan, task)], plan.config.language)
    origin, side = None, 0  # of the document before
    for item in source.read(plan.files, plan.tasks[task]):
        tally.read += 1
        if isinstance(item, Bad):
            tally.drop(item.reason, item.location, item.reason in source.malformed)
            continue
        if is_garbled(item.text):
            tally.drop(_NOT_TEXT, item.location, malformed=True)
            continue
        text, repairs = repair(item.text, clean.nfc)
        tally.repaired.update(repairs + ("invalid_utf8",) * item.repaired)
        tally.repaired.update(("replaced_before",) * ("\ufffd" in item.text and not item.repaired))
        verdict = judge(text, filters)
        if verdict is not True:
            tally.drop(verdict[1], item.location, malformed=False)
            continue
        sentences = split_sentences(text, cut)
        parts = [sentences] if len(text) <= MAX_DOCUMENT_CHARACTERS else list(_parts(sentences))
        tally.read += len(parts) - 1
        for part in parts:
            data = (text if len(parts) == 1 else "\n".join(part)).encode()
            tally.bytes += len(data)
            digest = blake2b(data, digest_size=16).digest()
            if item.origin != origin:
                origin, side = item.origin, int.from_bytes(digest[:8], "little")
            yield Piece(part, digest, side, origin, len(data), item.location)


def source_of(plan: Plan, task: int) -> int:
    """Index of the source that a map task reads."""
    return plan.files[plan.tasks[task][0].file].source


def held_out(plan: Plan, side: Any) -> Any:
    """Whether documents of these sides, a u64 or many, are held out."""
    return side < np.uint64(int(plan.config.val_fraction * 2**64))


def _parts(sentences: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    characters = 0
    for sentence in sentences:
        part.append(sentence)
        characters += len(sentence)
        if characters >= MAX_DOCUMENT_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part
