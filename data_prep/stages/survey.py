"""What tasks count for the diagnosis: of the documents as they are encoded, and of those that meet in a bucket.

Costly looks are at a sample that the text itself picks (a hash divisible by a number that follows from the corpus's
size), so that it is the same however the input is cut into tasks, and equal texts of two buckets are both in it.

Shapes: D documents, S sentences, T tokens.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cloze.corpus.masking import mix64
from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.scripts import character
from data_prep.plan import Plan
from data_prep.stages.buckets import Documents
from data_prep.stages.documents import Piece
from data_prep.text.mojibake import garbled

RUN_TOKENS = 50  # that two texts share: no accident

_SAMPLE_BYTES = 2**22  # of text to look at closely, of all the corpus
_LOOKED_AT = 2048  # characters of each of those documents
_MOST_WORDS = 10_000  # unknown ones remembered
_KEPT_WORDS = 50
_LINE_TOKENS = 8  # of a sentence: shorter ones repeat by their nature
_SHINGLE_TOKENS = 5
_LONG_TOKENS = 512  # of a document: every eighth of its shingles will do
_BASE, _MIXER = 0x9E3779B97F4A7C15, np.uint64(0xC2B2AE3D27D4EB4F)  # odd, bits well mixed
_PORTION_TOKENS = 2**17  # hashed at a time: bounds memory
_INVISIBLE = frozenset(
    {0xAD, 0x200B, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x2070), *range(0xE0000, 0xE0080)}
)

Hashes = npt.NDArray[np.uint64]


def modulus(plan: Plan) -> int:
    """One text in so many is looked at closely."""
    return max(1, plan.text_bytes // _SAMPLE_BYTES)


class Survey:
    """What a map task counts."""

    def __init__(self, modulus: int, tokenizer: Tokenizer, unk_id: int) -> None:
        self._modulus, self._tokenizer, self._unk_id = modulus, tokenizer, unk_id
        self._numbers: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._marks: Counter[str] = Counter()
        self._unknown_words: Counter[str] = Counter()
        self._garbled: list[str] = []
        self._first: dict[str, str] = {}
        self._largest: tuple[int, str | None] = (0, None)
        self._origin: tuple[int | None, int] = (
            None,
            0,
        )  # the last document and its bytes, since long ones come in parts

    @property
    def counts(self) -> dict[str, Any]:
        """As JSON knows it; `merged` adds those of several tasks."""
        names = (
            *("documents", "one_sentence", "sentences", "parts", "bytes", "tokens", "unknown", "dotless"),
            *("mojibake", "looked_at", "characters", "invisible"),
        )
        return {
            **{name: self._numbers[name] for name in names},
            "letters": dict(self._letters),
            "marks": dict(self._marks),
            "unknown_words": dict(self._unknown_words.most_common(_KEPT_WORDS)),
            "garbled": self._garbled,
            "first": self._first,
            "largest": list(self._largest),
        }

    def add(self, batch: Sequence[Piece], documents: Documents) -> None:
        """A batch and what it was encoded to."""
        numbers = self._numbers
        numbers["documents"] += len(batch)
        numbers["tokens"] += len(documents.tokens_T)
        numbers["parts"] += len(documents.lengths_S)  # sentences, those too long for a sample cut
        numbers["one_sentence"] += int((documents.sentences_D == 1).sum())
        unknown = np.flatnonzero(documents.tokens_T == self._unk_id)
        unknown_D = np.zeros(len(batch), np.int64)
        if len(unknown):
            edges_D = offsets(documents.lengths_S)[offsets(documents.sentences_D)]
            unknown_D = np.diff(np.searchsorted(unknown, edges_D))
            numbers["unknown"] += len(unknown)
            self._first.setdefault("unknown", batch[int(np.argmax(unknown_D > 0))].location)
        for piece, num_unknown in zip(batch, unknown_D.tolist(), strict=True):
            numbers["sentences"] += len(piece.sentences)
            numbers["bytes"] += piece.num_bytes
            before = self._origin[1] if self._origin[0] == piece.origin else 0
            self._origin = (piece.origin, before + piece.num_bytes)
            if self._origin[1] > self._largest[0]:
                self._largest = (self._origin[1], piece.location)
            if int.from_bytes(piece.digest[8:], "big") % self._modulus == 0:
                self._look_at(piece, num_unknown > 0)

    def _look_at(self, piece: Piece, has_unknown: bool) -> None:
        text = " ".join(piece.sentences)[:_LOOKED_AT]
        self._numbers["looked_at"] += 1
        self._numbers["characters"] += len(text)
        codes, counts = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            if code in _INVISIBLE:
                self._numbers["invisible"] += count
                self._first.setdefault("invisible", piece.location)
                continue
            script, is_letter, loses = character(chr(code))
            if is_letter:
                self._letters[script] += count
            if loses:
                self._marks[script] += count
                self._first.setdefault("marks", piece.location)
        dotless = text.count("\u0131") + text.count("\u0130")
        if dotless:
            self._numbers["dotless"] += dotless
            self._first.setdefault("dotless", piece.location)
        if not text.isascii() and (found := garbled(text)):
            self._numbers["mojibake"] += 1
            self._first.setdefault("mojibake", piece.location)
            if len(self._garbled) < 5:
                self._garbled.append(found)
        if has_unknown:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            self._unknown_words.update(text[begin:end] for token, (begin, end) in spans if token == self._unk_id)
            if len(self._unknown_words) > _MOST_WORDS:
                self._unknown_words = Counter(dict(self._unknown_words.most_common(_MOST_WORDS // 2)))


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all tasks, in their order."""
    result: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("letters", "marks", "unknown_words"):
            result[name] = dict(sum((Counter(value) for value in values), Counter[str]()))
        elif name == "first":
            result[name] = {key: place for value in reversed(values) for key, place in value.items()}
        elif name == "largest":
            result[name] = max(values, key=lambda value: value[0])
        elif name == "garbled":
            result[name] = [text for value in values for text in value][:5]
        else:
            result[name] = sum(values)
    return result


def fingerprints(documents: Documents, modulus: int) -> dict[str, Any]:
    """Of the documents of a bucket, those that a hash picks: sentences, runs of tokens, and a sketch of each text.

    `lines`: hashes of sentences of eight tokens or more. `runs`: hashes of the 50 tokens from a sentence's start on.
    `sketches`: three smallest hashes of a document's runs of five tokens (MinHash: equal with the cube of the Jaccard
    likeness). All for `unpacked`.
    """
    lines, runs, sketches = [], [], []
    edges_S, edges_D = offsets(documents.lengths_S), offsets(documents.sentences_D)
    token_D = edges_S[edges_D]
    cuts = [0, *(np.flatnonzero(np.diff(token_D[:-1] // _PORTION_TOKENS)) + 1).tolist(), len(token_D) - 1]
    for first, last in pairwise(cuts):
        if first == last:
            continue
        ranges_hashed = _RangeHashes(documents.tokens_T[token_D[first] : token_D[last]])
        edges_P = token_D[first : last + 1] - token_D[first]  # of the portion's documents
        begins_S = edges_S[edges_D[first] : edges_D[last]] - token_D[first]
        lengths_S = documents.lengths_S[edges_D[first] : edges_D[last]].astype(np.int64)
        ends_S = np.repeat(edges_P[1:], documents.sentences_D[first:last])
        long_S = lengths_S >= _LINE_TOKENS
        lines.append(_picked(ranges_hashed(begins_S[long_S], lengths_S[long_S]), modulus))
        runs.append(_picked(ranges_hashed(begins_S[begins_S + RUN_TOKENS <= ends_S], RUN_TOKENS), modulus))
        sketches.append(_sketches(ranges_hashed.windows(_SHINGLE_TOKENS), edges_P, modulus))
    return {
        "lines": packed(lines),
        "runs": packed(runs),
        "sketches": packed(sketches),
    }


def packed(parts: Sequence[npt.NDArray[Any]]) -> str:
    """Numbers of eight bytes as JSON takes them; in digits they would take ten times as long."""
    return b"".join(part.tobytes() for part in parts).hex()


def unpacked(results: Iterable[Mapping[str, Any]], name: str) -> Hashes:
    """Those of several buckets that `fingerprints` left under this name, one after another."""
    return np.frombuffer(bytes.fromhex("".join(result[name] for result in results)), np.uint64)


class _RangeHashes:
    """Hashes of any ranges of tokens at the cost of one pass: the polynomial sum of tokens times powers of an odd base.

    Sums up to each token; a range is a difference, divided (modulo 2^64) by the power at which it begins.
    """

    def __init__(self, tokens_T: npt.NDArray[np.unsignedinteger]) -> None:
        powers, self._inverses = _powers(max(_PORTION_TOKENS, 1 << len(tokens_T).bit_length()))
        self._sums: Hashes = np.zeros(len(tokens_T) + 1, np.uint64)
        np.cumsum((tokens_T.astype(np.uint64) + np.uint64(1)) * powers[: len(tokens_T)], out=self._sums[1:])

    def __call__(self, begins: Ints, lengths: Ints | int) -> Hashes:
        """Well mixed, of ranges that begin at `begins`."""
        return mix64((self._sums[begins + lengths] - self._sums[begins]) * self._inverses[begins])

    def windows(self, length: int) -> Hashes:
        """Of every `length` neighbours; only the upper bits are well mixed."""
        found: Hashes = self._sums[length:] - self._sums[:-length]
        found *= self._inverses[: len(found)]
        found *= _MIXER
        return found


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Of the base and of its inverse modulo 2^64."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        table = np.full(count, base, np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables[0], tables[1]


def _picked(hashes: Hashes, modulus: int) -> Hashes:
    """Those, or the rows whose first one, the corpus's sample holds."""
    first = hashes if hashes.ndim == 1 else hashes[:, 0]
    picked: Hashes = hashes[first % np.uint64(modulus) == 0]
    return picked


def _sketches(windows_T: Hashes, edges_D: Ints, modulus: int) -> Hashes:
    """Three minima of each document of 20 tokens or more that the first of them picks.

    Of a long document one window in eight is looked at.
    """
    lengths_D = np.diff(edges_D)
    few = windows_T < np.uint64(2**61)
    some = np.flatnonzero(few | np.repeat(lengths_D < _LONG_TOKENS, lengths_D)[: len(few)])
    document = np.searchsorted(edges_D, some, side="right") - 1
    counted = (some + _SHINGLE_TOKENS <= edges_D[document + 1]) & (lengths_D[document] >= 4 * _SHINGLE_TOKENS)
    hashes, document = windows_T[some[counted]], document[counted]
    if not len(hashes):
        return np.zeros((0, 3), np.uint64)
    at = np.flatnonzero(np.diff(document, prepend=-1))
    minima = [np.minimum.reduceat(mix64(hashes + np.uint64(salt)), at) for salt in range(3)]
    return _picked(np.stack(minima, axis=1), modulus)
