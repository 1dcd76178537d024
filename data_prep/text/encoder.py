"""Sentences -> token ids: what `tokenizers` gives, many times faster.

BERT's pre-tokenizer breaks at spaces, around punctuation and around ideographs, so the words between are encoded apart
and remembered. numpy finds the words of a batch, looks all of them up in a hash table of fixed size, and gathers their
ids; only a word not in the table is worth a line of Python: an ASCII one goes through the WordPiece model, another to
`tokenizers` whole. Text that spells "[SEP]" is text.

Knows one process's table, which outlives tasks; knows nothing of documents.

Shapes: S sentences, B bytes of their text in UTF-8, W words, T tokens, all one after another.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from cloze.corpus.ragged import Ints, offsets, ranges
from cloze.corpus.scripts import IDEOGRAPH_RANGES, UNSPACED_RANGES, unspaced_pre_tokenizer
from cloze.corpus.tokenizer import cuts_clusters

Ids = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint64]

_PORTION_CHARACTERS = 2**18  # encoded at a time
_SLOT_BITS = 18  # of the table: 10 MB in all
_MAX_WORDS = 150_000  # remembered; beyond that it starts afresh
_PROBES = 8  # slots from a word's own on in which it may lie
_COLUMNS = 3  # of eight bytes; longer words are not remembered: they seldom come twice

_DASHES_AND_QUOTES = (0x2010, 0x2027)  # all of them punctuation, often stuck to words

_SPACE, _SINGLE, _WORD = range(3)  # what a byte of UTF-8 is: between words, a word by itself, or part of one
_KINDS = np.full(256, _WORD, np.uint8)  # control characters too: BERT drops them without breaking the word
_KINDS[[byte for byte in range(0x21, 0x7F) if not chr(byte).isalnum()]] = _SINGLE
_KINDS[[ord(" "), ord("\n")]] = _SPACE

_PREFIXES = np.array([256**n - 1 for n in range(9)], np.uint64)  # the first n bytes of eight, least significant first
_NO_WORD = np.uint64(2**64 - 1)  # UTF-8 has no byte 0xFF
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, bits well mixed

# Encoded both ways at start-up: everything that the short cuts assume about a tokenizer.
PROBES = (
    "Hello, World! It's 3.14 o'clock -- don't_stop [SEP] [MASK][CLS] a[PAD]b ##ing un##able me@x.org $5+5=10 ~`^|<>",
    "Caf\u00e9 na\u00efve \u00c5NGSTR\u00d6M \u0130stanbul Stra\u00dfe \ufb01n e\u0301a \u0301b \u00bd\u00b2 \u20ac5",
    "\u2018q\u2019 \u201cq\u201d\u2014don\u2019t\u2026 \u0418\u0432\u0430\u043d \u0395\u03bb\u03ac\u03c2 \u03a3\u03a3",
    "\u6211\u7231\u5317\u4eac\u3002ABC\u4e2d\u6587abc \u6771\u4eac\u30bf\u30ef\u30fc \uf900\u0301x \ud55c\uad6d\uc5b4",
    "tab\there\xa0nbsp\u3000wide zero\u200bwidth soft\xadhyphen \ufffd bom\ufeff \x07bell  two   spaces n\0ul nul\0",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d \u0939\u093f\u0928\u094d \U0001f600\U0001f1e9 \U00020000\U0002b820",
    "\u0e01\u0e33\u0e25\u0e31\u0e07\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48abc\u0e01x\u0e01, \u0e38a \u0e01\u0301",
    "\u1019\u103c\u1014\u103a\u1019\u102c \u1781\u17d2\u1798\u17c2\u179a\u17d4 \ua000\ua001 " + "\u3042" * 120,
    "\u3089\u30fc\u3081\u3093\u30b3\u30f3\u30d4\u30e5\u30fc\u30bf\u3092 \u4f7f\u3046\u304b\u3099\uff76\uff9eA\u3042",
    "x" + "y" * 120 + " " + "-" * 50 + " eightlet eightletters sixteen_letters_ counterrevolutionaries",
)


class Encoder:
    """Encodes sentences without special tokens. One per process: it remembers what it has seen."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Check the short cuts against `tokenizer`; if they would change a single id, `cached` is False."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._model = tokenizer.model
        normalizer = tokenizer.normalizer
        is_bert = isinstance(normalizer, BertNormalizer) and normalizer.clean_text
        self._lowercase = is_bert and normalizer.lowercase
        self.spaces_ideographs = is_bert and normalizer.handle_chinese_chars
        self._is_single = np.zeros(0x10000, bool)  # characters beyond ASCII that are words by themselves
        for first, last in (_DASHES_AND_QUOTES, *(IDEOGRAPH_RANGES[:3] if self.spaces_ideographs else ())):
            self._is_single[first : last + 1] = True
        self._table = _Table()
        clusters = cuts_clusters(tokenizer)
        self._is_base: npt.NDArray[np.bool_] | None = _bases() if clusters else None
        self.cached = (
            is_bert
            and (clusters or isinstance(tokenizer.pre_tokenizer, BertPreTokenizer))
            and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
            and self._agrees()
        )

    def encode(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        """Ids of all sentences (u32 [T]) and the length of each (int64 [S]).

        While it works it needs about 50 bytes per character of a portion.
        """
        if not sentences:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        encode = self._gather if self.cached else self._reference
        begins_S = offsets(np.fromiter(map(len, sentences), np.int64, len(sentences)))[:-1]
        cuts = [0, *(np.flatnonzero(np.diff(begins_S // _PORTION_CHARACTERS)) + 1).tolist(), len(sentences)]
        ids, lengths = zip(*(encode(sentences[begin:end]) for begin, end in pairwise(cuts)), strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _gather(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        if self._table.num_words > _MAX_WORDS:
            self._table.clear()
        text = "\n".join(sentences)
        if text.count("\n") >= len(sentences):  # line breaks are spaces to BERT
            text = "\n".join([sentence.replace("\n", " ") for sentence in sentences])
        data = b"\n%b\n" % text.encode()
        bytes_B = np.frombuffer(data, np.uint8)
        starts_W, ends_W = self._words(bytes_B, text.isascii())
        keys_CxW = _keys(data, starts_W, ends_W - starts_W)
        slots_W = self._table.find(keys_CxW)
        first_W, counts_W, ids = self._table.first.take(slots_W), self._table.counts.take(slots_W), self._table.ids
        missing = np.flatnonzero(slots_W < 0)
        if len(missing):
            spans = zip(starts_W[missing].tolist(), ends_W[missing].tolist(), strict=True)
            words = [data[start:end] for start, end in spans]
            first_W[missing], counts_W[missing], ids = self._learn(words, keys_CxW[:, missing])
        edges = np.searchsorted(starts_W, np.flatnonzero(bytes_B == ord("\n")))
        return ids.take(ranges(first_W, counts_W)), np.diff(offsets(counts_W)[edges])

    def _words(self, bytes_B: npt.NDArray[np.uint8], is_ascii: bool) -> tuple[Ints, Ints]:
        """Where each word starts and ends. The first and the last byte are line breaks."""
        kinds_B = _KINDS.take(bytes_B)
        inside_B = kinds_B == _WORD
        begins_B = kinds_B == _SINGLE
        finishes_B = begins_B.copy()
        if not is_ascii:
            first = 0xE2 if self._is_base is None else 0xE0
            lead = np.flatnonzero((bytes_B >= first) & (bytes_B < 0xF0))  # of three bytes that are one character
            high, middle, low = (bytes_B[lead + i].astype(np.int64) for i in range(3))
            character = (high & 0xF) << 12 | (middle & 0x3F) << 6 | low & 0x3F
            if self._is_base is not None:  # a word begins there, and what went before ends
                base = lead[self._is_base[character]]
                begins_B[base] = True
                finishes_B[base - 1] |= inside_B[base - 1]
            lead = lead[self._is_single[character]]
            inside_B[lead] = inside_B[lead + 1] = inside_B[lead + 2] = False
            begins_B[lead] = finishes_B[lead + 2] = True
        begins_B[1:] |= inside_B[1:] & ~inside_B[:-1]
        finishes_B[:-1] |= inside_B[:-1] & ~inside_B[1:]
        return np.flatnonzero(begins_B), np.flatnonzero(finishes_B) + 1

    def _learn(self, words: list[bytes], keys_CxM: Keys) -> tuple[Ints, Ints, Ids]:
        """Encode words that the table lacks: where the ids of each begin, how many they are, and among which ids."""
        fresh = sorted(set(words), key=len)  # those too long to be remembered come last
        number = dict(zip(fresh, range(len(fresh)), strict=True))
        number_M = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        encoded = self._encode_words(fresh)
        offsets_F = offsets(np.fromiter(map(len, encoded), np.int64, len(fresh)))
        ids = np.fromiter(chain.from_iterable(encoded), np.uint32, int(offsets_F[-1]))
        ids, offsets_F = np.concatenate([self._table.ids, ids]), offsets_F + len(self._table.ids)
        row_F = np.empty(len(fresh), np.int64)
        row_F[number_M] = np.arange(len(words))
        short = bisect_right(fresh, 8 * _COLUMNS, key=len)
        self._table.add(keys_CxM[:, row_F[:short]], offsets_F[: short + 1], ids[: offsets_F[short]])
        return offsets_F[number_M], np.diff(offsets_F)[number_M], ids

    def _encode_words(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        others = [word.decode() for word in words if not word.isalnum()]
        encodings = iter(self._tokenizer.encode_batch(others, add_special_tokens=False))
        return [self._alphanumeric(word) if word.isalnum() else next(encodings).ids for word in words]

    def _alphanumeric(self, word: bytes) -> Sequence[int]:
        text = word.decode()
        return [token.id for token in self._model.tokenize(text.lower() if self._lowercase else text)]

    def _reference(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        encodings = self._tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths_S = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths_S.sum())), lengths_S

    def _agrees(self) -> bool:
        for probes in (PROBES, PROBES[::-1]):  # seen for the first time, and remembered
            ours, reference = self._gather(probes), self._reference(probes)
            if not (np.array_equal(ours[0], reference[0]) and np.array_equal(ours[1], reference[1])):
                return False
        return True


def _bases() -> npt.NDArray[np.bool_]:
    """Which characters, of those of three bytes, begin a cluster of a script without spaces: asked of the library."""
    codes = [code for first, last in UNSPACED_RANGES for code in range(first, last + 1) if code < 0x10000]
    text = " ".join(f"\u0e01{chr(code)}" for code in codes)
    begins = {begin for _, (begin, _) in unspaced_pre_tokenizer().pre_tokenize_str(text)}
    is_base = np.zeros(0x10000, bool)
    is_base[[code for number, code in enumerate(codes) if 3 * number + 1 in begins]] = True
    return is_base


class _Table:
    """Words and where their ids lie: a hash table with open addressing, all of whose look-ups numpy does at once.

    A word of up to 24 bytes is its own key: three numbers, the bytes after its end zero. No slot is ever freed.
    """

    def __init__(self) -> None:
        size = 2**_SLOT_BITS + _PROBES
        self.num_words = 0
        self.first, self.counts = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.ids = np.zeros(0, np.uint32)
        self._keys = np.zeros((_COLUMNS, size), np.uint64)
        self._taken = bytearray(size)

    def clear(self) -> None:
        """In place: megabytes that come and go make the heap grow."""
        self.num_words, self.ids = 0, self.ids[:0].copy()
        self._keys.fill(0)
        self.counts.fill(0)
        self._taken[:] = bytes(len(self._taken))

    def find(self, keys_CxW: Keys) -> Ints:
        """The slot of each word, -1 where it has none."""
        slots_W = _homes(keys_CxW)
        left = np.arange(len(slots_W))
        for _ in range(_PROBES):
            there = slots_W[left]
            same = np.ones(len(left), bool)
            for column, keys_W in zip(self._keys, keys_CxW, strict=True):
                same &= column.take(there) == keys_W.take(left)
            left = left[~same]
            if not len(left):
                return slots_W
            slots_W[left] += 1
        slots_W[left] = -1
        return slots_W

    def add(self, keys_CxW: Keys, offsets_W: Ints, ids: Ids) -> None:
        """Remember words that are not there, where there is room, and that their ids lie at `offsets_W` of `ids`."""
        places_W = np.full(len(offsets_W) - 1, -1)
        for word, home in enumerate(_homes(keys_CxW).tolist()):
            places_W[word] = place = self._taken.find(0, home, home + _PROBES)
            if place >= 0:
                self._taken[place] = 1
        kept = np.flatnonzero(places_W >= 0)
        places = places_W[kept]
        self._keys[:, places] = keys_CxW[:, kept]
        self.first[places], self.counts[places] = offsets_W[kept], np.diff(offsets_W)[kept]
        self.ids = ids
        self.num_words += len(kept)


def _keys(data: bytes, starts_W: Ints, lengths_W: Ints) -> Keys:
    """The first 24 bytes of every word, as three numbers; zero after its end."""
    padded = data + bytes(8 * _COLUMNS)
    windows_B: Keys = np.ndarray(len(data), "<u8", padded, strides=1)  # the eight bytes from each byte on
    keys_CxW = np.empty((_COLUMNS, len(starts_W)), np.uint64)
    for column, keys_W in enumerate(keys_CxW):
        lengths = np.clip(lengths_W - 8 * column, 0, 8)
        keys_W[:] = windows_B.take(np.minimum(starts_W + 8 * column, len(data) - 1)) & _PREFIXES.take(lengths)
    keys_CxW[:, lengths_W > 8 * _COLUMNS] = _NO_WORD
    return keys_CxW


def _homes(keys_CxW: Keys) -> Ints:
    """The slot at which to look for a word first."""
    mixed_W: npt.NDArray[np.uint64] = np.bitwise_xor.reduce(keys_CxW * _FACTORS[:, None])
    return (mixed_W >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
