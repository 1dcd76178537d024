"""Sentences -> token ids: what `tokenizers` gives, many times faster.

BERT's pre-tokenizer breaks at spaces, around punctuation and around ideographs, so the words between are encoded apart
and remembered. numpy finds the words of a batch, looks all of them up in a hash table of fixed size, and gathers their
ids. The vocabulary's whole words are there from the start; only a word not in the table is worth a line of Python: an
ASCII one goes through the WordPiece model, another to `tokenizers` whole. Text that spells "[SEP]" is text.

Knows one process's table, which outlives tasks; knows nothing of documents.

Shapes: S sentences, B bytes of their text in UTF-8, W words, T tokens, all one after another.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
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
_SLOT_BITS = 18  # of the table: 9 MB in all
_COUNT_BITS = 8  # how many ids a word has; one of more is not remembered
_MOST_IDS = 2**_COUNT_BITS - 1
_MAX_WORDS = 150_000  # remembered; beyond that it starts afresh
_PROBES = 8  # slots from a word's own on in which it may lie
_SHORT = 7  # bytes of a word that one column tells from all others, since its last byte is zero then
_COLUMNS = 3  # of eight bytes; longer words are not remembered: they seldom come twice

_DASHES_AND_QUOTES = (0x2010, 0x2027)  # all of them punctuation, often stuck to words

_SPACE, _SINGLE, _WORD = range(3)  # what a byte of UTF-8 is: between words, a word by itself, or part of one
_KINDS = bytes(  # control characters are part of one: BERT drops them without breaking the word
    _SPACE if chr(byte) in " \n" else _SINGLE if 0x21 <= byte < 0x7F and not chr(byte).isalnum() else _WORD
    for byte in range(256)
)

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

    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int] | None = None) -> None:
        """Check the short cuts against `tokenizer`; if they would change a single id, `cached` is False.

        `vocabulary` is the tokenizer's, if it is at hand.
        """
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
        clusters = cuts_clusters(tokenizer)
        self._is_base: npt.NDArray[np.bool_] | None = _bases() if clusters else None
        self._table = _Table()
        self._whole = self._whole_words(vocabulary or tokenizer.get_vocab()) if is_bert else {}
        self._start_afresh()
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
            self._start_afresh()
        text = "\n".join(sentences)
        if text.count("\n") >= len(sentences):  # line breaks are spaces to BERT
            text = "\n".join([sentence.replace("\n", " ") for sentence in sentences])
        data = self._bytes(text)
        bytes_B = np.frombuffer(data, np.uint8)
        starts_W, ends_W = self._words(data, text.isascii())
        lengths_W = ends_W - starts_W
        keys_CxW = _keys(data, starts_W, lengths_W)
        spans_W = self._table.find(keys_CxW, np.flatnonzero(lengths_W > _SHORT))
        first_W, counts_W = spans_W >> _COUNT_BITS, spans_W & _MOST_IDS
        missing = np.flatnonzero(spans_W < 0)
        if len(missing):
            spans = zip(starts_W[missing].tolist(), ends_W[missing].tolist(), strict=True)
            words = [data[start:end] for start, end in spans]
            first_W[missing], counts_W[missing] = self._learn(words, keys_CxW[:, missing])
        edges = np.searchsorted(starts_W, np.flatnonzero(bytes_B == ord("\n")))
        offsets_W = offsets(counts_W)
        ids_T = np.repeat(self._table.ids.take(first_W), counts_W)
        several = np.flatnonzero(counts_W > 1)
        counts = counts_W[several]
        ids_T[ranges(offsets_W[several], counts)] = self._table.ids.take(ranges(first_W[several], counts))
        return ids_T, np.diff(offsets_W[edges])

    def _bytes(self, text: str) -> bytes:
        """Lines in UTF-8, a line break before and after, and of what BERT does to text all that costs nothing here."""
        data = text.encode().replace(b"\0", b"")  # it drops them; zeros tell where a key ends
        return b"\n%b\n" % (data.lower() if self._lowercase else data)  # ASCII's letters

    def _words(self, data: bytes, is_ascii: bool) -> tuple[Ints, Ints]:
        """Where each word starts and ends. The first and the last byte are line breaks."""
        kinds_B = np.frombuffer(data.translate(_KINDS), np.uint8)
        inside_B, outside_B = kinds_B == _WORD, kinds_B == _SPACE
        joined_B = inside_B[1:] & inside_B[:-1]  # with the next one
        if not is_ascii:
            bytes_B = np.frombuffer(data, np.uint8)
            first = 0xE2 if self._is_base is None else 0xE0
            lead = np.flatnonzero((bytes_B >= first) & (bytes_B < 0xF0))  # of three bytes that are one character
            high, middle, low = (bytes_B[lead + i].astype(np.int64) for i in range(3))
            character = (high & 0xF) << 12 | (middle & 0x3F) << 6 | low & 0x3F
            if self._is_base is not None:  # a word begins there, and what went before ends
                joined_B[lead[self._is_base[character]] - 1] = False
            lead = lead[self._is_single[character]]
            joined_B[lead - 1] = joined_B[lead + 2] = False
        begins_B, finishes_B = ~outside_B, ~outside_B
        begins_B[1:] &= ~joined_B
        finishes_B[:-1] &= ~joined_B
        return np.flatnonzero(begins_B), np.flatnonzero(finishes_B) + 1

    def _learn(self, words: list[bytes], keys_CxM: Keys) -> tuple[Ints, Ints]:
        """Encode words that the table lacks: where the ids of each begin in the table's, and how many they are."""
        fresh = sorted(set(words), key=len)  # those too long to be remembered come last
        number = dict(zip(fresh, range(len(fresh)), strict=True))
        number_M = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
        encoded = self._encode_words(fresh)
        counts_F = np.fromiter(map(len, encoded), np.int64, len(fresh))
        ids = np.fromiter(chain.from_iterable(encoded), np.uint32, int(counts_F.sum()))
        row_F = np.empty(len(fresh), np.int64)
        row_F[number_M] = np.arange(len(words))
        short = bisect_right(fresh, 8 * _COLUMNS, key=len)
        first_F = self._table.add(keys_CxM[:, row_F[:short]], counts_F, ids)
        return first_F[number_M], counts_F[number_M]

    def _encode_words(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        others = [word.decode() for word in words if not word.isalnum()]
        encodings = iter(self._tokenizer.encode_batch(others, add_special_tokens=False))
        return [self._alphanumeric(word) if word.isalnum() else next(encodings).ids for word in words]

    def _alphanumeric(self, word: bytes) -> Sequence[int]:
        return [token.id for token in self._model.tokenize(word.decode())]

    def _whole_words(self, vocabulary: Mapping[str, int]) -> dict[str, int]:
        """Words of ASCII's letters and digits that are tokens as they stand: most words of a text in English."""
        longest = min(8 * _COLUMNS, self._model.max_input_chars_per_word)
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        words = {
            word: index
            for word, index in vocabulary.items()
            if word.isalnum() and word.isascii() and len(word) <= longest and word not in added
        }
        if self._lowercase:
            words = {word: index for word, index in words.items() if word == word.lower()}
        return words if len(words) <= _MAX_WORDS // 2 else {}

    def _start_afresh(self) -> None:
        """With nothing remembered but the whole words."""
        self._table.clear()
        data = self._bytes("\n".join(self._whole))
        starts_W, ends_W = self._words(data, True)
        ids_W = np.fromiter(self._whole.values(), np.uint32, len(self._whole))
        self._table.add(_keys(data, starts_W, ends_W - starts_W), np.ones(len(ids_W), np.int64), ids_W)

    def _reference(self, sentences: Sequence[str]) -> tuple[Ids, Ints]:
        encodings = self._tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths_S = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths_S.sum())), lengths_S

    def _agrees(self) -> bool:
        whole = " ".join([*self._whole][:: 1 + len(self._whole) // 100])
        for probes in ((whole, *PROBES), PROBES[::-1]):  # seen for the first time, and remembered
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
        self._rows = np.zeros((size, 2), np.uint64)  # first column of the key, and span: side by side in memory
        self._rest = np.zeros((_COLUMNS - 1, size), np.uint64)  # of the key
        self._taken = np.zeros(size, bool)
        self.ids = np.zeros(2**16, np.uint32)  # the first `_num_ids` are those of words remembered
        self.num_words = self._num_ids = 0

    def clear(self) -> None:
        """In place: megabytes that come and go make the heap grow."""
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
    keys_CxW[0] = windows_B.take(starts_W) & _PREFIXES.take(np.minimum(lengths_W, 8))
    for column in range(1, _COLUMNS):
        long = np.flatnonzero(lengths_W > 8 * column)
        lengths = np.minimum(lengths_W[long] - 8 * column, 8)
        keys_CxW[column, long] = windows_B[starts_W[long] + 8 * column] & _PREFIXES.take(lengths)  # `take` copies first
    keys_CxW[:, lengths_W > 8 * _COLUMNS] = _NO_WORD
    return keys_CxW


def _homes(keys_CxW: Keys, long: Ints) -> Ints:
    """The slot at which to look for a word first. The columns after the first are zero but for `long` words."""
    mixed_W = keys_CxW[0] * _FACTORS[0]
    mixed_W[long] ^= np.bitwise_xor.reduce(keys_CxW[1:, long] * _FACTORS[1:, None])
    mixed_W >>= np.uint64(64 - _SLOT_BITS)
    homes_W: Ints = mixed_W.view(np.int64)
    return homes_W
