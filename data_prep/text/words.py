"""Where words begin, one bit per token: what masking by whole words and by spans must know.

A WordPiece token that begins with "##" goes on with a word. Of other kinds the characters tell: a word is what the
pre-tokenizer takes for one, cut once more before white space, around punctuation and around the tokens of scripts that
write no spaces; a token that goes on with a character begins nothing.

Chinese has no spaces, so runs of ideographs are segmented by jieba (optional: cloze[zh]). WordPiece has text cut there
before it is encoded, which leaves ids as they are, since BERT puts spaces around ideographs anyway. Training reads the
bits from the shards and needs neither jieba nor the vocabulary.
"""

import logging
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.scripts import IDEOGRAPHS, is_unspaced
from cloze.corpus.tokenizer import CorpusTokenizer
from cloze.errors import UserError
from data_prep.text.cutters.base import Offsets
from data_prep.text.encoder import Encoder, Ids

_RUN = re.compile(f"([{IDEOGRAPHS}]+)")

Cut = Callable[[str], list[str]]
Encode = Callable[[Sequence[str]], tuple[Ids, Ints, npt.NDArray[np.bool_]]]


def word_encoder(tokenizer: CorpusTokenizer, segments_chinese: bool) -> tuple[Encoder, Encode]:
    """An encoder, and how it encodes sentences to ids, lengths and where words begin."""
    if tokenizer.kind.continuation:
        encoder = Encoder(tokenizer.backend, tokenizer.vocabulary)
        return encoder, WordEncoder(encoder, tokenizer.backend, segments_chinese).encode
    encoder = Encoder(tokenizer.backend, tokenizer.vocabulary, CharacterRule(segments_chinese))
    return encoder, encoder.encode_words


class CharacterRule:
    """Where words begin by the characters of a text."""

    def __init__(self, segments_chinese: bool) -> None:
        self._segments_chinese = segments_chinese

    def begins(self, text: str, offsets: Offsets, word_ids: Sequence[int | None]) -> list[bool]:
        """See `data_prep.text.cutters.base.WordRule`."""
        rows = list(zip(offsets, word_ids, strict=True))
        firsts = [begin for i, ((begin, _), word) in enumerate(rows) if i == 0 or word != rows[i - 1][1]]
        segments = self._segments(text, firsts)
        found: list[bool] = []
        before: tuple[int, int] | None = None
        number: int | None = None
        for (begin, end), word in rows:
            if before is None or word != number:
                found.append(True)
            else:  # a token that goes on with the last one's character begins nothing
                found.append(before[1] <= begin < len(text) and self._breaks(text, before[0], begin, segments))
            before, number = (begin, end), word
        return found

    def _breaks(self, text: str, before: int, begin: int, segments: set[int] | None) -> bool:
        """Whether a word begins with the token at `begin`, after one at `before`."""
        last, letter = text[begin - 1], text[begin]
        if letter.isspace():
            return not last.isspace()
        if last.isspace():
            return bool(text[before:begin].strip())  # else the white space before it began the word
        if segments is not None and _RUN.fullmatch(letter) and _RUN.fullmatch(last):
            return begin in segments
        return not _is_mark(letter) and (_is_apart(letter) or _is_apart(last))

    def _segments(self, text: str, firsts: Sequence[int]) -> set[int] | None:
        """Where the words of Chinese begin, as jieba sees what stands between the `firsts`."""
        if not self._segments_chinese or text.isascii():
            return None
        found: set[int] = set()
        edges = [0, *firsts, len(text)]
        for first, last in pairwise(edges):
            for run in _RUN.finditer(text, first, last):
                place = run.start()
                for word in _jieba()(run[0]) if len(run[0]) > 1 else [run[0]]:
                    found.add(place)
                    place += len(word)
        return found


@lru_cache(maxsize=2**16)
def _is_apart(letter: str) -> bool:
    """Whether a character is a word by itself, or may be one: punctuation, symbols, scripts without spaces."""
    if _RUN.fullmatch(letter) or is_unspaced(letter):
        return True
    return not (letter.isalnum() or _is_mark(letter))


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "M"


class WordEncoder:
    """A WordPiece encoder that also tells which tokens begin a word. One per process, as its encoder."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, segments_chinese: bool) -> None:
        self._encoder = encoder
        normalizer = tokenizer.normalizer
        is_bert = isinstance(normalizer, BertNormalizer) and normalizer.clean_text
        self._segments_chinese = segments_chinese and is_bert and normalizer.handle_chinese_chars
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._continues_V = np.zeros(max(vocabulary.values()) + 1, bool)
        self._continues_V[[index for token, index in vocabulary.items() if token.startswith("##")]] = True

    def encode(self, sentences: Sequence[str]) -> tuple[Ids, Ints, npt.NDArray[np.bool_]]:
        """Ids (u32 [T]), tokens of each sentence (int64 [S]), and which tokens begin a word (bool [T])."""
        parts: list[str] = []
        is_word: list[bool] = []
        parts_S = np.ones(len(sentences), np.int64)
        for number, sentence in enumerate(sentences):
            before = len(parts)
            if self._segments_chinese and not sentence.isascii():
                for index, run in enumerate(_RUN.split(sentence)):
                    found = [run] if not index % 2 else _jieba()(run) if len(run) > 1 else [run]
                    parts += found
                    is_word += [bool(index % 2)] * len(found)
            else:
                parts.append(sentence)
                is_word.append(False)
            parts_S[number] = len(parts) - before
        ids_T, lengths_P = self._encoder.encode(parts)
        starts_T = ~self._continues_V[ids_T]
        edges_P = offsets(lengths_P)
        word_P = np.asarray(is_word, bool) & (lengths_P > 0)
        starts_T[np.repeat(word_P, lengths_P)] = False
        starts_T[edges_P[:-1][word_P]] = True
        return ids_T, np.diff(edges_P[offsets(parts_S)]), starts_T


@lru_cache(maxsize=1)
def _jieba() -> Cut:
    """jieba's segmentation with its own dictionary, whatever else this process or another user does with jieba."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes and imports that newer Pythons frown at
            import jieba
    except ImportError:
        raise UserError(
            "masking: the text holds Chinese, whose words jieba finds: pip install 'cloze[zh]', or set "
            "masking.chinese_words=false (every character is then a word)"
        ) from None
    jieba.setLogLevel(logging.ERROR)
    segmenter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:  # its cache is a file of fixed name where anyone may write
        segmenter.tmp_dir = folder
        segmenter.initialize()
    cut: Cut = segmenter.lcut
    return cut
