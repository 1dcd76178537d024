"""Sentences -> token ids: what `tokenizers` gives, many times faster.

A tokenizer's text falls into words that are encoded apart, and remembered. numpy finds the words of a batch, looks all
of them up in a hash table of fixed size, and gathers their ids; only a word not in the table is worth a line of Python.
How words are found and encoded, the kind's cutter says (`cutters/`). Text that spells "[SEP]" is text.

Knows one process's table, which outlives tasks; knows nothing of documents.

Shapes: S sentences, B bytes of their text in UTF-8, W words, T tokens, all one after another.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from cloze.corpus.ragged import Ints, offsets, ranges
from data_prep.text.cutters.base import BEGINS, PROBES, WordRule, cutter_of

Ids = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint64]

_PORTION_CHARACTERS = 2**18  # encoded at a time
_SLOT_BITS = 18  # of the table: 9 MB in all
_COUNT_BITS = 8  # how many ids a word has; one of more is not remembered
_MOST_IDS = 2**_COUNT_BITS - 1
_MAX_WORDS = 150_000  # remembered; beyond that it starts afresh
_PROBES = 8  # slots from a word's own on in which it may lie
_SHORT = 7  # bytes of a word that one column tells from all others, since its last byte is zero then
_COLUMNS = 3  # of eight bytes; longer words are not remembered: they seldom come twice

_PREFIXES = np.array([256**n - 1 for n in range(9)], np.uint64)  # the first n bytes of eight, least significant first
_NO_WORD = np.uint64(2**64 - 1)  # UTF-8 has no byte 0xFF
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, bits well mixed

_BEGINS = np.uint32(BEGINS)  # the bit of a token that begins a word
_ID = np.uint32(BEGINS - 1)


class Encoder:
    """Encodes sentences without special tokens. One per process: it remembers what it has seen."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: Mapping[str, int] | None = None, words: WordRule | None = None
    ) -> None:
        """Check the short cuts against `tokenizer`; if they would change a single id, `cached` is False.

        `vocabulary` is the tokenizer's, if it is at hand. `words` is needed for `encode_words`.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self._rule = tokenizer, words
        self._table = _Table()
        self.cutter = cutter_of(tokenizer, vocabulary or tokenizer.get_vocab())
        self._whole: dict[str, int] = {}
        if self.cutter is not None:
            whole = self.cutter.whole_words()
            self._whole = whole if len(whole) <= _MAX_WORDS // 2 else {}
            self._start_afresh()
        self.cached = self.cutter is not None and self._agrees()
        self._unspoken = _unspoken(tokenizer)

    def encode(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        """Ids of all sentences (u32 [T]) and the length of each (int64 [S]).

        While it works it needs about 50 bytes per character of a portion.
        """
        ids_T, lengths_S = self._encode(sentences)
        return ids_T & _ID if self._rule else ids_T, lengths_S

    def encode_words(self, sentences: Sequence[str]) -> tuple[Ids, Ints, npt.NDArray[np.bool_]]:
        """Ids, lengths, and which tokens begin a word by the rule (bool [T])."""
        assert self._rule is not None, "no rule says where words begin"
        ids_T, lengths_S = self._encode(sentences)
        return ids_T & _ID, lengths_S, ids_T >= _BEGINS

    def _encode(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        if not sentences:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        encode = self._portion if self.cached else self._reference
        begins_S = offsets(np.fromiter(map(len, sentences), np.int64, len(sentences)))[:-1]
        cuts = [0, *(np.flatnonzero(np.diff(begins_S // _PORTION_CHARACTERS)) + 1).tolist(), len(sentences)]
        ids, lengths = zip(*(encode(sentences[begin:end]) for begin, end in pairwise(cuts)), strict=True)
        ids_T = np.concatenate(ids)
        if self._unspoken is not None:
            unknown, special_V = self._unspoken
            spoken_T = special_V.take(ids_T & _ID)
            ids_T[spoken_T] = ids_T[spoken_T] & _BEGINS | unknown
        return ids_T, np.concatenate(lengths)

    def _portion(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        """By the short cuts; sentences for which they are not meant, by `tokenizers`."""
        assert self.cutter is not None
        odd = self.cutter.odd(sentences)
        if not odd:
            return self._gather(sentences)
        ordinary = sorted({*range(len(sentences))} - {*odd})
        parts = [self._reference([sentences[i] for i in odd])]
        if ordinary:
            parts.append(self._gather([sentences[i] for i in ordinary]))
        ids_T, lengths_S = (np.concatenate(column) for column in zip(*parts, strict=True))
        order_S = np.argsort([*odd, *ordinary])
        return ids_T[ranges(offsets(lengths_S)[order_S], lengths_S[order_S])], lengths_S[order_S]

    def _gather(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        assert self.cutter is not None
        if self._table.num_words > _MAX_WORDS:
            self._start_afresh()
        data, starts_W, ends_W = self.cutter.cut(sentences)
        lengths_W = ends_W - starts_W
        keys_CxW = _keys(data, starts_W, lengths_W)
        spans_W = self._table.find(keys_CxW, np.flatnonzero(lengths_W > _SHORT))
        first_W, counts_W = spans_W >> _COUNT_BITS, spans_W & _MOST_IDS
        missing = np.flatnonzero(spans_W < 0)
        if len(missing):
            spans = zip(starts_W[missing].tolist(), ends_W[missing].tolist(), strict=True)
            words = [data[start:end] for start, end in spans]
            first_W[missing], counts_W[missing] = self._learn(words, keys_CxW[:, missing])
        edges = np.searchsorted(starts_W, np.flatnonzero(np.frombuffer(data, np.uint8) == self.cutter.edge))
        offsets_W = offsets(counts_W)
        ids_T = np.repeat(self._table.ids.take(first_W), counts_W)
        several = np.flatnonzero(counts_W > 1)
        counts = counts_W[several]
        ids_T[ranges(offsets_W[several], counts)] = self._table.ids.take(ranges(first_W[several], counts))
        return ids_T, np.diff(offsets_W[edges])

    def _learn(self, words: list[bytes], keys_CxM: Keys) -> tuple[Ints, Ints]:
        """Encode words that the table lacks: where the ids of each begin in the table's, and how many they are."""
        assert self.cutter is not None
        fresh = sorted(set(words), key=len)  # those too long to be remembered come last
        number = dict(zip(fresh, range(len(fresh)), strict=True))
        number_M = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        encoded = self.cutter.encode(fresh) if self._rule is None else self.cutter.encode_words(fresh, self._rule)
        counts_F = np.fromiter(map(len, encoded), np.int64, len(fresh))
        ids = np.fromiter(chain.from_iterable(encoded), np.uint32, int(counts_F.sum()))
        row_F = np.empty(len(fresh), np.int64)
        row_F[number_M] = np.arange(len(words))
        short = bisect_right(fresh, 8 * _COLUMNS, key=len)
        first_F = self._table.add(keys_CxM[:, row_F[:short]], counts_F, ids)
        return first_F[number_M], counts_F[number_M]

    def _start_afresh(self) -> None:
        """With nothing remembered but the whole words."""
        assert self.cutter is not None
        self._table.clear()
        if self._whole:
            data, starts_W, ends_W = self.cutter.cut([*self._whole])
            ids_W = np.fromiter(self._whole.values(), np.uint32, len(self._whole))
            keys_CxW = _keys(data, starts_W, ends_W - starts_W)
            order_W = np.argsort(ids_W)  # mostly that of frequency: who comes first is found at once
            ids_W |= _BEGINS if self._rule else np.uint32(0)
            self._table.add(keys_CxW[:, order_W], np.ones(len(ids_W), np.int64), ids_W[order_W])

    def _reference(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        encodings = self._tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths_S = np.fromiter(map(len, ids), np.int64, len(ids))
        ids_T = np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths_S.sum()))
        if self._rule is not None:
            begins = [
                self._rule.begins(sentence, encoding.offsets, encoding.word_ids)
                for sentence, encoding in zip(sentences, encodings, strict=True)
            ]
            ids_T |= np.fromiter(chain.from_iterable(begins), np.uint32, len(ids_T)) * _BEGINS
        return ids_T, lengths_S

    def _agrees(self) -> bool:
        assert self.cutter is not None
        for probes in (self.cutter.probes(), PROBES[::-1]):  # seen for the first time, and remembered
            ours, reference = self._portion(probes), self._reference(probes)
            if not (np.array_equal(ours[0], reference[0]) and np.array_equal(ours[1], reference[1])):
                return False
        return True


def _unspoken(tokenizer: Tokenizer) -> tuple[np.uint32, npt.NDArray[np.bool_]] | None:
    """The unknown token, and which tokens it stands in for where a text spells them: the special ones of a Unigram.

    To its model they are pieces as others are, and better ones; no other model makes them of text.
    """
    if not isinstance(tokenizer.model, Unigram):
        return None
    unknown = np.uint32(json.loads(tokenizer.model.__getstate__())["unk_id"])
    special_V = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), bool)
    special_V[[index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = True
    return unknown, special_V


class _Table:
    """Words and where their ids lie: a hash table with open addressing, all of whose look-ups numpy does at once.

    A word of up to 24 bytes is its own key: three numbers, the bytes after its end zero. No slot is ever freed.
    """

    def __init__(self) -> None:
        size = 2**_SLOT_BITS + _PROBES
        self._rows = np.zeros((size, 2), np.uint64)  # first column of the key, and span: side by side in memory
        self._rest = np.zeros((_COLUMNS - 1, size), np.uint64)  # of the key
        self._taken = np.zeros(size, bool)
        self.ids = np.zeros(2**16, np.uint32)  # the first `_num_ids` are those of words remembered
        self.num_words = self._num_ids = 0

    def clear(self) -> None:
        """In place: megabytes that come and go make the heap grow, and those never written to are no memory yet."""
        if not self.num_words:
            return
        self.num_words = self._num_ids = 0
        self._rows.fill(0)
        self._rest.fill(0)
        self._taken.fill(False)

    def find(self, keys_CxW: Keys, long: Ints) -> Ints:
        """The span of each word: where its ids begin, shifted by `_COUNT_BITS`, and how many; -1 where it has none.

        `long` are the words that their first eight bytes do not tell from all others.
        """
        slots_W = _homes(keys_CxW, long)
        rows_Wx2 = self._rows.take(slots_W, axis=0)
        spans_W = rows_Wx2[:, 1].astype(np.int64)
        same_W = rows_Wx2[:, 0] == keys_CxW[0]
        for rest, keys_W in zip(self._rest, keys_CxW[1:], strict=True):
            same_W[long] &= rest.take(slots_W[long]) == keys_W.take(long)
        left = np.flatnonzero(~same_W)
        for _ in range(_PROBES - 1):
            if not len(left):
                return spans_W
            slots_W[left] += 1
            slots = slots_W[left]
            same = self._rows[slots, 0] == keys_CxW[0, left]
            same &= (self._rest[:, slots] == keys_CxW[1:, left]).all(axis=0)
            spans_W[left[same]] = self._rows[slots[same], 1]
            left = left[~same]
        spans_W[left] = -1
        return spans_W

    def add(self, keys_CxW: Keys, counts_F: Ints, ids: Ids) -> Ints:
        """Remember words that are not there, where there is room. Returns where the ids of each begin.

        There may be more counts and ids than words: those are kept until the next call only.
        """
        begin, end = self._num_ids, self._num_ids + len(ids)
        if end >= len(self.ids):  # one to spare: a word without ids may begin at the end
            self.ids = np.concatenate([self.ids[:begin], np.zeros(2 * end - begin, np.uint32)])
        self.ids[begin:end] = ids
        first_F = begin + offsets(counts_F)[:-1]
        spans_F = first_F << _COUNT_BITS | counts_F
        slots_W = _homes(keys_CxW, np.arange(keys_CxW.shape[1]))
        left = np.flatnonzero(counts_F[: len(slots_W)] <= _MOST_IDS)
        for _ in range(_PROBES):
            free = left[~self._taken[slots_W[left]]]
            places, words = np.unique(slots_W[free], return_index=True)  # of several that want a slot, one gets it
            words = free[words]
            self._taken[places] = True
            self._rows[places, 0], self._rows[places, 1] = keys_CxW[0, words], spans_F[words]
            self._rest[:, places] = keys_CxW[1:, words]
            self.num_words += len(words)
            missed = np.ones(len(slots_W), bool)
            missed[words] = False
            left = left[missed[left]]
            slots_W[left] += 1
        self._num_ids += int(counts_F[: len(slots_W)].sum())
        return first_F


def _keys(data: bytes, starts_W: Ints, lengths_W: Ints) -> Keys:
    """The first 24 bytes of every word, as three numbers; zero after its end."""
    padded = data + bytes(8 * _COLUMNS)
    windows_B: Keys = np.ndarray(len(data), "<u8", padded, strides=1)  # the eight bytes from each byte on
    keys_CxW = np.zeros((_COLUMNS, len(starts_W)), np.uint64)
    keys_CxW[0] = windows_B.take(starts_W) & _PREFIXES.take(lengths_W, mode="clip")
    for column in range(1, _COLUMNS):
        long = np.flatnonzero(lengths_W > 8 * column)
        prefixes = _PREFIXES.take(lengths_W[long] - 8 * column, mode="clip")
        keys_CxW[column, long] = windows_B[starts_W[long] + 8 * column] & prefixes  # `take` copies all windows first
    keys_CxW[:, lengths_W > 8 * _COLUMNS] = _NO_WORD
    return keys_CxW


def _homes(keys_CxW: Keys, long: Ints) -> Ints:
    """The slot at which to look for a word first. The columns after the first are zero but for `long` words."""
    mixed_W = keys_CxW[0] * _FACTORS[0]
    mixed_W[long] ^= np.bitwise_xor.reduce(keys_CxW[1:, long] * _FACTORS[1:, None])
    mixed_W >>= np.uint64(64 - _SLOT_BITS)
    homes_W: Ints = mixed_W.view(np.int64)
    return homes_W
