"""Words of byte-level BPE (Radford et al. 2019): letters, digits, other marks, each with the space before; white space.

The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`. What a letter is,
is asked of the library, character by character.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, pre_tokenizers

from cloze.corpus.kinds.bpe import byte_of
from cloze.corpus.ragged import Ints
from data_prep.text.cutters.base import Characters, Cutter, Offsets, WordRule, flagged, ordinary_added

_LETTER, _NUMBER, _OTHER, _WHITE, _EDGE = range(5)
_APOSTROPHE, _SPACE = 0x27, 0x20
_ENDINGS = {1: ("s", "t", "m", "d"), 2: ("re", "ve", "ll")}  # that stand apart after an apostrophe


class ByteLevelCutter(Cutter):
    @classmethod
    def suits(cls, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
        splitter = tokenizer.pre_tokenizer
        return (
            isinstance(tokenizer.model, models.BPE)
            and isinstance(splitter, pre_tokenizers.ByteLevel)
            and splitter.use_regex
            and (tokenizer.normalizer is None or _is_nfc(tokenizer))
        )

    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> None:
        self._model = tokenizer.model
        self._added = ordinary_added(tokenizer)
        self._composes = tokenizer.normalizer is not None
        self._prefix = " " if tokenizer.pre_tokenizer.add_prefix_space else ""
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)

        def ask(letter: str) -> int:
            if letter == "\0":
                return _EDGE
            joined = (len(splitter.pre_tokenize_str(beside + letter)) == 1 for beside in "a1!")
            return next((number for number, is_joined in enumerate(joined) if is_joined), _WHITE)

        self._characters = Characters(ask)
        ascii_classes = self._characters.of("".join(map(chr, range(128))))[1]
        self._ascii = bytes(ascii_classes) + bytes(128)
        letters = {byte: letter for letter, byte in byte_of().items()}
        self._letters = {byte: letters[byte] for byte in range(256)}

    def odd(self, sentences: Sequence[str]) -> list[int]:
        text = "\0".join(sentences)
        if text.count("\0") < len(sentences) and not self._is_odd(text):
            return []
        return [number for number, one in enumerate(sentences) if "\0" in one or self._is_odd(one)]

    def _is_odd(self, text: str) -> bool:
        if self._composes and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return True
        return self._added is not None and self._added.search(text) is not None

    def cut(self, sentences: Sequence[str]) -> tuple[bytes, Ints, Ints]:
        if self._prefix:
            sentences = [f" {one}" if one and not one.startswith(" ") else one for one in sentences]
        text = "\0".join(["", *sentences, ""])
        data = text.encode()
        if text.isascii():
            codes_C: npt.NDArray[np.integer] = np.frombuffer(data, np.uint8)
            return data, *_words(codes_C, np.frombuffer(data.translate(self._ascii), np.uint8))
        codes_C, classes_C = self._characters.of(text)
        widths_C = 1 + (codes_C >= 0x80).astype(np.int64) + (codes_C >= 0x800) + (codes_C >= 0x10000)
        places_C = np.concatenate([[0], np.cumsum(widths_C)])
        starts_W, ends_W = _words(codes_C, classes_C)
        return data, places_C[starts_W], places_C[ends_W]

    def encode(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        tokenize, letters = self._model.tokenize, self._letters
        return [[token.id for token in tokenize(word.decode("latin-1").translate(letters))] for word in words]

    def encode_words(self, words: Sequence[bytes], rule: WordRule) -> list[Sequence[int]]:
        found: list[Sequence[int]] = []
        for word in words:
            tokens = self._model.tokenize(word.decode("latin-1").translate(self._letters))
            offsets = _offsets(word, [len(token.value) for token in tokens])
            begins = rule.begins(word.decode(), offsets, [0] * len(tokens))
            found.append(flagged([token.id for token in tokens], begins))
        return found


def _is_nfc(tokenizer: Tokenizer) -> bool:
    return bool(json.loads(tokenizer.normalizer.__getstate__()) == {"type": "NFC"})


def _words(codes_C: npt.NDArray[np.integer], classes_C: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Where each word starts and ends, in characters. The first and the last one are edges."""
    inside_C, white_C = classes_C != _EDGE, classes_C == _WHITE
    starts_C = inside_C.copy()
    starts_C[1:] &= (classes_C[1:] != classes_C[:-1]) & ~((codes_C[:-1] == _SPACE) & ~white_C[1:])
    # Of white space before a word the last one stands apart: it is the word's if it is a space, else a word itself.
    starts_C[1:-1] |= white_C[:-2] & white_C[1:-1] & ~white_C[2:] & inside_C[2:]
    quotes = np.flatnonzero((codes_C == _APOSTROPHE) & starts_C)
    for length, endings in _ENDINGS.items():
        if not len(quotes):
            break
        rows = quotes[quotes + length < len(codes_C) - 1]  # the last one is an edge
        letters_Lx = codes_C[rows[:, None] + np.arange(1, length + 1)]
        matches = np.zeros(len(rows), bool)
        for ending in endings:
            matches |= (letters_Lx == np.asarray([ord(letter) for letter in ending])).all(axis=1)
        rows = rows[matches]
        starts_C[rows + 1] = False
        after = rows + 1 + length
        starts_C[after] = inside_C[after]
    finishes_C = inside_C.copy()
    finishes_C[:-1] &= starts_C[1:] | ~inside_C[1:]
    return np.flatnonzero(starts_C), np.flatnonzero(finishes_C) + 1


def _offsets(word: bytes, sizes: Sequence[int]) -> Offsets:
    """Which characters tokens of so many bytes lie in."""
    index, number = [], -1
    for byte in word:
        number += byte & 0xC0 != 0x80
        index.append(number)
    found, begin = [], 0
    for size in sizes:
        found.append((index[begin], index[begin + size - 1] + 1))
        begin += size
    return found
