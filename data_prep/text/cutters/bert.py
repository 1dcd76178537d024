"""BERT's words: between spaces, around punctuation and around ideographs.

The vocabulary's whole words are known from the start; of others an ASCII one goes through the WordPiece model, another
to `tokenizers` whole.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from cloze.corpus.ragged import Ints
from cloze.corpus.scripts import IDEOGRAPH_RANGES, UNSPACED_RANGES, unspaced_pre_tokenizer
from cloze.corpus.tokenizer import cuts_clusters
from data_prep.text.cutters.base import PROBES, Cutter, WordRule, flagged

_DASHES_AND_QUOTES = (0x2010, 0x2027)  # all of them punctuation, often stuck to words
_LONGEST = 24  # bytes of a word that the encoder remembers

_SPACE, _WORD, _SINGLE = range(3)  # what a byte of UTF-8 is: between words, part of one, or a word by itself
_KINDS = bytes(  # control characters are part of one: BERT drops them without breaking the word
    _SPACE if chr(byte) in " \n" else _SINGLE if 0x21 <= byte < 0x7F and not chr(byte).isalnum() else _WORD
    for byte in range(256)
)
_MARKS = frozenset(chr(byte) for byte in range(0x80) if _KINDS[byte] == _SINGLE)


class BertCutter(Cutter):
    edge = ord("\n")

    @classmethod
    def suits(cls, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
        normalizer = tokenizer.normalizer
        return (
            isinstance(normalizer, BertNormalizer)
            and normalizer.clean_text
            and (cuts_clusters(tokenizer) or isinstance(tokenizer.pre_tokenizer, BertPreTokenizer))
            and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
        )

    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> None:
        self._tokenizer, self._model, self._vocabulary = tokenizer, tokenizer.model, vocabulary
        self._lowercase = tokenizer.normalizer.lowercase
        self._is_single = np.zeros(0x10000, bool)  # characters beyond ASCII that are words by themselves
        ideographs = IDEOGRAPH_RANGES[:3] if tokenizer.normalizer.handle_chinese_chars else ()
        for first, last in (_DASHES_AND_QUOTES, *ideographs):
            self._is_single[first : last + 1] = True
        self._is_base: npt.NDArray[np.bool_] | None = _bases() if cuts_clusters(tokenizer) else None
        self._whole = self._whole_words()

    def odd(self, sentences: Sequence[str]) -> list[int]:
        return []

    def cut(self, sentences: Sequence[str]) -> tuple[bytes, Ints, Ints]:
        text = "\n".join(sentences)
        if text.count("\n") >= len(sentences):  # line breaks are spaces to BERT
            text = "\n".join([sentence.replace("\n", " ") for sentence in sentences])
        data = self._bytes(text)
        return data, *self._words(data, text.isascii())

    def _bytes(self, text: str) -> bytes:
        """Lines in UTF-8, a line break before and after, and of what BERT does to text all that costs nothing here."""
        data = text.encode().replace(b"\0", b"")  # it drops them; zeros tell where a key ends
        return b"\n%b\n" % (data.lower() if self._lowercase else data)  # ASCII's letters

    def _words(self, data: bytes, is_ascii: bool) -> tuple[Ints, Ints]:
        """Where each word starts and ends. The first and the last byte are line breaks."""
        kinds_B = np.frombuffer(data.translate(_KINDS), np.uint8)
        inside_B = kinds_B == _WORD
        begins_B, finishes_B = kinds_B > 0, kinds_B > 0
        begins_B[1:] = kinds_B[1:] > inside_B[:-1]  # no space, and not both of them part of a word
        finishes_B[:-1] = kinds_B[:-1] > inside_B[1:]
        if not is_ascii:
            bytes_B = np.frombuffer(data, np.uint8)
            first = 0xE2 if self._is_base is None else 0xE0
            lead = np.flatnonzero((bytes_B >= first) & (bytes_B < 0xF0))  # of three bytes that are one character
            high, middle, low = (bytes_B[lead + i].astype(np.int64) for i in range(3))
            character = (high & 0xF) << 12 | (middle & 0x3F) << 6 | low & 0x3F
            if self._is_base is not None:  # a word begins there, and what went before ends
                _part(lead[self._is_base[character]], kinds_B, begins_B, finishes_B)
            lead = lead[self._is_single[character]]
            _part(lead, kinds_B, begins_B, finishes_B)
            _part(lead + 3, kinds_B, begins_B, finishes_B)
        return np.flatnonzero(begins_B), np.flatnonzero(finishes_B) + 1

    def encode(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        others = [word.decode() for word in words if not word.isalnum()]
        encodings = iter(self._tokenizer.encode_batch(others, add_special_tokens=False))
        return [self._alphanumeric(word) if word.isalnum() else next(encodings).ids for word in words]

    def _alphanumeric(self, word: bytes) -> Sequence[int]:
        return [token.id for token in self._model.tokenize(word.decode())]

    def encode_words(self, words: Sequence[bytes], rule: WordRule) -> list[Sequence[int]]:
        texts = [word.decode() for word in words]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        found = zip(texts, encodings, strict=True)
        return [flagged(each.ids, rule.begins(text, each.offsets, each.word_ids)) for text, each in found]

    def whole_words(self) -> dict[str, int]:
        return self._whole

    def _whole_words(self) -> dict[str, int]:
        """Those of ASCII's letters and digits, and its marks: most words of a text in English."""
        longest = min(_LONGEST, self._model.max_input_chars_per_word)
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        words = {
            word: index
            for word, index in self._vocabulary.items()
            if word.isascii() and (word.isalnum() or word in _MARKS) and len(word) <= longest and word not in added
        }
        if self._lowercase:
            words = {word: index for word, index in words.items() if word == word.lower()}
        return words

    def probes(self) -> Sequence[str]:
        words = [*self._whole]
        return " ".join(words[:: 1 + len(words) // 100]), *PROBES


def _part(
    places: Ints, kinds_B: npt.NDArray[np.uint8], begins_B: npt.NDArray[np.bool_], finishes_B: npt.NDArray[np.bool_]
) -> None:
    """Let words, if there are any, begin at these bytes, and end before them."""
    begins_B[places] = kinds_B[places] != _SPACE
    finishes_B[places - 1] = kinds_B[places - 1] != _SPACE


def _bases() -> npt.NDArray[np.bool_]:
    """Which characters, of those of three bytes, begin a cluster of a script without spaces: asked of the library."""
    codes = [code for first, last in UNSPACED_RANGES for code in range(first, last + 1) if code < 0x10000]
    text = " ".join(f"\u0e01{chr(code)}" for code in codes)
    begins = {begin for _, (begin, _) in unspaced_pre_tokenizer().pre_tokenize_str(text)}
    is_base = np.zeros(0x10000, bool)
    is_base[[code for number, code in enumerate(codes) if 3 * number + 1 in begins]] = True
    return is_base
