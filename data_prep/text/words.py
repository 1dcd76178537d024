"""Where words begin, one bit per token: what masking by whole words and by spans must know.

A WordPiece token that begins with "##" goes on with a word. Chinese has no spaces, so runs of ideographs are segmented
by jieba (optional: cloze[zh]) and cut there before they are encoded; BERT puts spaces around ideographs anyway, hence
the ids stay the same. Training reads the bits from the shards and needs neither jieba nor the vocabulary.
"""

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cloze.corpus.ragged import Ints, offsets
from cloze.corpus.scripts import IDEOGRAPHS
from cloze.errors import UserError
from data_prep.text.encoder import Encoder, Ids

_RUN = re.compile(f"([{IDEOGRAPHS}]+)")

Cut = Callable[[str], list[str]]


class WordEncoder:
    """An encoder that also tells which tokens begin a word. One per process, as its encoder."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, segments_chinese: bool) -> None:
        self._encoder = encoder
        self._segments_chinese = segments_chinese and encoder.spaces_ideographs
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
