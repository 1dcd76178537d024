"""Words between single spaces: of Unigram behind Metaspace, and of BPE none of whose tokens reaches over a space.

A word is encoded together with the space before it. Beyond one word a normalizer changes things only at characters that
are asked for here: sentences with such go to `tokenizers` whole.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from cloze.corpus.kinds.bpe import METASPACE
from cloze.corpus.ragged import Ints
from data_prep.text.cutters.base import Characters, Cutter, WordRule, flagged, ordinary_added

_ORDINARY, _MARK, _ODD, _SPACE, _EDGE = range(5)
_CONTROLS = bytes([*range(1, 0x20), 0x7F])
_PRINTABLE = "".join(repeats * chr(code) for repeats in (1, 2, 3) for code in range(0x21, 0x7F))


class SpaceCutter(Cutter):
    @classmethod
    def suits(cls, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
        if isinstance(tokenizer.model, models.Unigram):
            return _splits(tokenizer)
        return (
            isinstance(tokenizer.model, models.BPE)
            and METASPACE in vocabulary
            and not any(METASPACE in token.lstrip(METASPACE) for token in vocabulary)
            and "ByteLevel" not in repr(tokenizer.pre_tokenizer)
        )

    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> None:
        self._tokenizer, self._model = tokenizer, tokenizer.model
        self._added = ordinary_added(tokenizer)
        self._normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        self._characters = Characters(self._class_of)
        plain = [token.value for token in self._model.tokenize(METASPACE + _PRINTABLE)]
        encoding = tokenizer.encode(f" {_PRINTABLE}", add_special_tokens=False)
        self._as_it_is = (
            isinstance(self._model, models.Unigram) and encoding.tokens == plain
        )  # no normalizer's business

    def _class_of(self, letter: str) -> int:
        if letter in "\0 ":
            return _EDGE if letter == "\0" else _SPACE
        made = self._normalize(letter)
        if not made or METASPACE in made or any(part.isspace() for part in made):
            return _ODD
        return _MARK if unicodedata.category(made[0]) in ("Mn", "Mc", "Me", "Cf") else _ORDINARY

    def odd(self, sentences: Sequence[str]) -> list[int]:
        text = "\0".join(["", *sentences, ""])
        if text.count("\0") == len(sentences) + 1 and not self._is_odd(text):
            return []
        return [number for number, one in enumerate(sentences) if "\0" in one or self._is_odd(f"\0{one}\0")]

    def _is_odd(self, text: str) -> bool:
        if "  " in text or "\0 " in text or " \0" in text or (self._added and self._added.search(text)):
            return True
        if text.isascii():
            return len(text.encode().translate(None, _CONTROLS)) < len(text)
        classes_C = self._characters.of(text)[1]
        return bool((classes_C == _ODD).any() or ((classes_C[1:] == _MARK) & (classes_C[:-1] >= _SPACE)).any())

    def cut(self, sentences: Sequence[str]) -> tuple[bytes, Ints, Ints]:
        data = "\0".join(["", *sentences, ""]).encode()
        bytes_B = np.frombuffer(data, np.uint8)
        edge_B, space_B = bytes_B == self.edge, bytes_B == ord(" ")
        starts_B, finishes_B = space_B.copy(), ~edge_B
        starts_B[1:] |= edge_B[:-1] & ~edge_B[1:]
        finishes_B[:-1] &= edge_B[1:] | space_B[1:]
        return data, np.flatnonzero(starts_B), np.flatnonzero(finishes_B) + 1

    def encode(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        plain = [self._as_it_is and word.isascii() and word.startswith(b" ") for word in words]
        others = [word.decode() for word, is_plain in zip(words, plain, strict=True) if not is_plain]
        encodings = iter(self._tokenizer.encode_batch(others, add_special_tokens=False))
        tokenize = self._model.tokenize
        return [
            [token.id for token in tokenize(METASPACE + word[1:].decode())] if is_plain else next(encodings).ids
            for word, is_plain in zip(words, plain, strict=True)
        ]

    def encode_words(self, words: Sequence[bytes], rule: WordRule) -> list[Sequence[int]]:
        texts = [word.decode() for word in words]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        found = zip(texts, encodings, strict=True)
        return [flagged(each.ids, rule.begins(text, each.offsets, each.word_ids)) for text, each in found]


def _splits(tokenizer: Tokenizer) -> bool:
    """Whether its pre-tokenizer is Metaspace that splits, alone or after one that splits at white space."""
    if tokenizer.pre_tokenizer is None:
        return False
    settings = json.loads(tokenizer.pre_tokenizer.__getstate__())
    parts: list[dict[str, Any]] = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    metaspace = {"type": "Metaspace", "replacement": METASPACE, "split": True}
    *before, last = parts
    return metaspace.items() <= last.items() and all(part == {"type": "WhitespaceSplit"} for part in before)
