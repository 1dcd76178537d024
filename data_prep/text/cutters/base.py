"""What a cutter is: the words of some tokenizers that are encoded apart, so that each need be encoded only once.

Exact where encoding the words of a text one by one gives the ids of the text: `Encoder` checks that on `PROBES`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cloze.corpus.ragged import Ints

BEGINS = 1 << 31  # set in the id of a token that begins a word; ids have 31 bits

Offsets = Sequence[tuple[int, int]]

# Encoded both ways at start-up: everything that short cuts assume about tokenizers.
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
    "we'll they're I've it's I'd I'm can't 'tis 'Tis rock'n'roll ''s 'the' O'Neil's 3'd \u00e9's 's _'s\t's \n'll end",
    "if x:\n    y = [1, 2,  3] # two\n\n\treturn  x\n ",
    " leading",
    "trailing  ",
    "",
    "a\u2581b \u2581 c \u00b4x x\u3000y",
    "\u2460\u2461 \uff28\uff49 \u212b \u2126 10\u207b\u00b2 \u0967\u0968 ``q''",
    "\u1e9b\u0323 \u1100\u1161\u11a8 \u200dx a\u200d b\u200b c",
)


class WordRule(Protocol):
    """Where words begin (`data_prep.text.words`)."""

    def begins(self, text: str, offsets: Offsets, word_ids: Sequence[int | None]) -> list[bool]:
        """Of each token, whether it begins a word: from its characters and the number of the pre-tokenizer's word."""


class Cutter(ABC):
    """Finds words in bytes, and encodes them."""

    cutters: ClassVar[list[type["Cutter"]]] = []
    edge: ClassVar[int] = 0  # the byte between two sentences

    def __init_subclass__(cls) -> None:
        Cutter.cutters.append(cls)

    @classmethod
    @abstractmethod
    def suits(cls, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> bool:
        """Whether it is meant for such tokenizers."""

    @abstractmethod
    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> None: ...

    @abstractmethod
    def odd(self, sentences: Sequence[str]) -> list[int]:
        """Which sentences are to be encoded by `tokenizers`, ascending."""

    @abstractmethod
    def cut(self, sentences: Sequence[str]) -> tuple[bytes, Ints, Ints]:
        """The sentences in UTF-8, `edge` before, between and after; where each word starts, and ends."""

    @abstractmethod
    def encode(self, words: Sequence[bytes]) -> list[Sequence[int]]:
        """The ids of each word."""

    @abstractmethod
    def encode_words(self, words: Sequence[bytes], rule: WordRule) -> list[Sequence[int]]:
        """The ids of each word, `BEGINS` set where a token begins one by the rule."""

    def whole_words(self) -> dict[str, int]:
        """Words that are tokens as they stand: known before any is encoded."""
        return {}

    def probes(self) -> Sequence[str]:
        """What is encoded both ways at start-up."""
        return PROBES


def cutter_of(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> Cutter | None:
    """The one that is meant for a tokenizer, if there is one."""
    suiting = (cutter for cutter in Cutter.cutters if cutter.suits(tokenizer, vocabulary))
    return next((cutter(tokenizer, vocabulary) for cutter in suiting), None)


def flagged(ids: Sequence[int], begins: Sequence[bool]) -> list[int]:
    """Ids with `BEGINS` where a word begins."""
    return [index | BEGINS if starts else index for index, starts in zip(ids, begins, strict=True)]


def ordinary_added(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What finds added tokens that are no special ones: they are taken out of a text before it is cut."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special}
    shortest = [token for token in sorted(added) if not any(other in token for other in added - {token})]
    return re.compile("|".join(map(re.escape, shortest))) if shortest else None


class Characters:
    """Classes of characters, each asked for once."""

    _NEW = 255

    def __init__(self, ask: Callable[[str], int]) -> None:
        self._ask = ask
        self._classes = np.full(0x110000, self._NEW, np.uint8)

    def of(self, text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """Code points and classes of a text's characters."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        found = self._classes.take(codes)
        if (found == self._NEW).any():
            for code in np.unique(codes[found == self._NEW]).tolist():
                self._classes[code] = self._ask(chr(code))
            found = self._classes.take(codes)
        return codes, found
