"""How a tokenizer cuts the words of a corpus, and the same tokenizer with words added.

Counts on samples as the shards hold them. New words take the places that a vocabulary keeps free ("[unused7]"), then
rows after the last one; every other id stays, so that a model goes on with its embeddings.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cloze.corpus.kinds.base import UNUSED
from cloze.corpus.kinds.bpe import METASPACE, SPACE
from cloze.corpus.tokenizer import CorpusTokenizer, checked, description

_SPACES = f" {SPACE}{METASPACE}"
_COMMON = 60  # words that are listed
_FEWEST = 2  # times that a word must come to be worth a row

Tokens = npt.NDArray[np.integer]


class CutWord(NamedTuple):
    """A word of several pieces."""

    text: str
    times: int
    pieces: int

    @property
    def saved(self) -> int:
        """Tokens fewer, were it one."""
        return self.times * (self.pieces - 1)


class Cutting(NamedTuple):
    """How words are cut."""

    words: int
    pieces: int  # of those words
    tokens: int  # of all text, special ones not counted
    cut: list[CutWord]  # which could be added, those first that would save most
    common: list[tuple[str, int]]  # the commonest words, whole or cut, and how often they come

    def saved(self, count: int) -> float:
        """The share of the tokens that the first `count` words would save."""
        return sum(word.saved for word in self.cut[:count]) / max(1, self.tokens)


def cutting(parts: Iterable[Tokens], tokenizer: CorpusTokenizer) -> Cutting:
    """Of the tokens of samples, special ones included. A word has a letter; it ends at spaces and punctuation."""
    kind, facts = tokenizer.kind, tokenizer.facts
    spaced_V, spelling_V, apart_V, special_V = (np.zeros(facts.vocab_size, bool) for _ in range(4))
    for token, index in tokenizer.vocabulary.items():
        spaced_V[index] = kind.begins_word(token)
        text = kind.readable(token.removeprefix(kind.continuation)).strip(_SPACES)
        spelling_V[index] = any(letter.isalnum() or letter == "\ufffd" for letter in text)
        apart_V[index] = bool(text) and not spelling_V[index]
    special_V[[*facts.special_ids, *facts.never_drawn]] = True
    special_V[facts.unk_id] = False
    spelling_V &= ~special_V
    apart_V = special_V | apart_V & (np.arange(facts.vocab_size) != facts.unk_id)
    counts: Counter[bytes] = Counter()
    tokens = 0
    for tokens_T in parts:
        tokens_T = tokens_T.astype(np.uint32)
        starts_T = spaced_V[tokens_T] | apart_V[tokens_T]
        starts_T[1:] |= apart_V[tokens_T[:-1]]
        edges = [*(4 * np.flatnonzero(starts_T)).tolist(), 4 * len(tokens_T)]
        data = tokens_T.tobytes()
        counts.update(data[begin:end] for begin, end in pairwise(edges))
        tokens += int((~special_V[tokens_T]).sum())
    found: Counter[tuple[str, int]] = Counter()
    common: Counter[str] = Counter()
    words = pieces = 0
    for key, count in counts.items():
        ids = np.frombuffer(key, np.uint32)
        if not spelling_V[ids].any():
            continue
        words += count
        pieces += count * len(ids)
        if count >= _FEWEST and facts.unk_id not in ids:
            common[tokenizer.backend.decode(ids.tolist()).strip()] += count
        if count >= _FEWEST and len(ids) > 1 and spaced_V[ids[0]] and facts.unk_id not in ids:
            text = tokenizer.backend.decode(ids.tolist()).strip()
            if text.isprintable() and " " not in text and "\ufffd" not in text and any(map(str.isalpha, text)):
                found[text, len(ids)] += count
    cut = [CutWord(text, count, size) for (text, size), count in found.items()]
    cut.sort(key=lambda word: (-word.saved, word.text))
    return Cutting(words, pieces, tokens, cut, common.most_common(_COMMON))


def unknown_words(parts: Iterable[Tokens], tokenizer: CorpusTokenizer, other: CorpusTokenizer) -> dict[str, int]:
    """Words and signs, each one token of `tokenizer`, that `other` cuts or does not know, and how often they come.

    Of the tokens of samples, the commonest first. Where a script is unknown to `other`, its own shards cannot tell.
    """
    uses_V = np.zeros(tokenizer.facts.vocab_size, np.int64)
    for tokens_T in parts:
        uses_V += np.bincount(tokens_T, minlength=len(uses_V))
    uses_V[[*tokenizer.facts.special_ids, *tokenizer.facts.never_drawn]] = 0
    found: Counter[str] = Counter()
    for token, index in tokenizer.vocabulary.items():
        if uses_V[index] >= _FEWEST and tokenizer.kind.begins_word(token):
            text = tokenizer.backend.decode([index]).strip()
            ids = other.backend.encode(text, add_special_tokens=False).ids
            if text.isprintable() and (len(ids) > 1 or other.facts.unk_id in ids):
                found[text] += int(uses_V[index])
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def extended(tokenizer: CorpusTokenizer, words: Sequence[str]) -> CorpusTokenizer:
    """The tokenizer with `words` as tokens of their own; those that it has are passed over.

    Raises `UserError` where its kind takes no words.
    """
    backend, kind, vocabulary = tokenizer.backend, tokenizer.kind, tokenizer.vocabulary
    tokens = [
        token for token in dict.fromkeys(kind.token_of(backend, word) for word in words) if token not in vocabulary
    ]
    free = sorted(index for token, index in vocabulary.items() if UNUSED.fullmatch(token))
    rows = [*free, *range(tokenizer.facts.vocab_size, tokenizer.facts.vocab_size + len(tokens))]
    body = json.loads(backend.to_str())
    placed = dict(zip(tokens, rows, strict=False))
    taken = {*placed.values()}
    body["added_tokens"] = [token for token in body["added_tokens"] if token["id"] not in taken]
    _complete(body["model"], body["added_tokens"])
    kind.place(backend, body["model"], placed)
    beside = description(tokenizer)
    return checked(Tokenizer.from_str(json.dumps(body)), "the extended tokenizer", [beside])


def _complete(model: dict[str, Any], added: Sequence[dict[str, Any]]) -> None:
    """Give added tokens that the model lacks a place in it: else their ids would move behind the new ones."""
    vocabulary = model["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    outside = {token["content"]: token["id"] for token in added if token["content"] not in known}
    if isinstance(vocabulary, dict):
        vocabulary |= outside
    else:
        least = min(score for _, score in vocabulary)
        vocabulary += [[token, least] for token in sorted(outside, key=outside.__getitem__)]
