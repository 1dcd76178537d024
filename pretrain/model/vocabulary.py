"""Which rows of another vocabulary become rows of ours, and of which pieces a new word's row is the mean.

Rows are those of embeddings and of the head's bias. Knows tokenizers, not models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor

from cloze.corpus.kinds.base import UNUSED
from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import CorpusTokenizer

_ROLES = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")


@dataclass(frozen=True)
class Rows:
    """Our row `ours[i]` is theirs `theirs[i]`; that of a key of `means` is the mean of theirs. The others are fresh."""

    ours: Sequence[int]
    theirs: Sequence[int]
    means: Mapping[int, Sequence[int]] = field(default_factory=dict)
    told: str = ""

    @property
    def most(self) -> int:
        """The highest of theirs."""
        return max(self.theirs, default=-1)

    def fill(self, target: Tensor, given: Tensor) -> None:
        """Write the rows of `given` into `target`."""
        target[torch.as_tensor(self.ours)] = given[torch.as_tensor(self.theirs)].to(target.dtype)
        for row, pieces in self.means.items():
            target[row] = given[torch.as_tensor(pieces)].to(target.dtype).mean(0)


def same_rows(facts: TokenizerFacts) -> Rows:
    """The same tokenizer."""
    return Rows(range(facts.vocab_size), range(facts.vocab_size))


def extended_rows(theirs: CorpusTokenizer, ours: CorpusTokenizer) -> Rows | None:
    """Where our tokenizer is theirs with words added, at the end or in places that were kept free; None where not.

    A new word begins as the mean of the pieces that it was cut into before, as Hewitt (2021) has the mean of all.
    """
    names = {row: token for token, row in ours.vocabulary.items()}
    moved = [token for token, row in theirs.vocabulary.items() if names.get(row) != token]
    if not all(UNUSED.fullmatch(token) for token in moved) or _pipeline(theirs) != _pipeline(ours):
        return None
    added = {row: token for row, token in names.items() if theirs.vocabulary.get(token) != row}
    kept = [row for row in range(min(theirs.facts.vocab_size, ours.facts.vocab_size)) if row not in added]
    whole = ours.backend.get_added_tokens_decoder()  # which are looked for in the text before it is cut
    pieces = {row: _pieces(theirs, token, whole=row in whole) for row, token in added.items()}
    everything = sorted(theirs.vocabulary.values())
    unknown = sum(not found for found in pieces.values())
    told = f"{len(added):,} words added, each from the mean of its old pieces" if added else ""
    told += f" ({unknown:,} that had none from the mean of all)" if unknown else ""
    return Rows(kept, kept, {row: found or everything for row, found in pieces.items()}, told)


def rows_by_text(theirs: CorpusTokenizer, ours: CorpusTokenizer) -> Rows:
    """Tokens that both vocabularies have: the same text, or the same role among the special ones."""
    roles = {getattr(ours.facts, role): getattr(theirs.facts, role) for role in _ROLES}
    known = {_text(token, theirs): row for token, row in theirs.vocabulary.items()}
    pairs = {row: known[text] for token, row in ours.vocabulary.items() if (text := _text(token, ours)) in known}
    pairs |= {row: other for row, other in roles.items() if row is not None and other is not None}
    share = len(pairs) / len(ours.vocabulary)
    told = f"{len(pairs):,} of {len(ours.vocabulary):,} tokens ({share:.0%}) by their text, the others are fresh"
    return Rows(list(pairs), list(pairs.values()), told=told)


def _pieces(tokenizer: CorpusTokenizer, token: str, *, whole: bool) -> list[int]:
    """What a token of another vocabulary was cut into, but for what was unknown. `whole`: it is plain text."""
    backend, prefix, vocabulary = tokenizer.backend, _continuation(tokenizer), tokenizer.vocabulary
    as_text = backend.encode(token, add_special_tokens=False).ids if whole else []
    if as_text or prefix is None:
        found = as_text or [piece.id for piece in backend.model.tokenize(token)]
        return [row for row in found if row != tokenizer.facts.unk_id]
    ids: list[int] = []
    rest, mark = token.removeprefix(prefix), prefix if token.startswith(prefix) else ""
    while rest:  # WordPiece's own way, which gives up a word for one letter
        ends = (end for end in range(len(rest), 0, -1) if mark + rest[:end] in vocabulary)
        end = next(ends, 0)
        if end:
            ids.append(vocabulary[mark + rest[:end]])
        rest, mark = rest[end or 1 :], prefix
    return ids


def _continuation(tokenizer: CorpusTokenizer) -> str | None:
    """WordPiece's mark of what goes on with a word; None where a mark stands before what begins one."""
    model = tokenizer.backend.model
    return model.continuing_subword_prefix if type(model).__name__ == "WordPiece" else None


def _text(token: str, tokenizer: CorpusTokenizer) -> tuple[bool, str]:
    """(whether it begins a word, its text): "##ing" of one vocabulary is "ing" of another, and "the" is "▁the"."""
    if prefix := _continuation(tokenizer):
        return not token.startswith(prefix), token.removeprefix(prefix)
    if "ByteLevel" in repr(tokenizer.backend.pre_tokenizer):
        text = decoders.ByteLevel().decode([token])
        return text.startswith(" "), token if "\ufffd" in text else text.removeprefix(" ")  # a part of a letter
    return token.startswith("▁"), token.removeprefix("▁")


def _pipeline(tokenizer: CorpusTokenizer) -> Any:
    """What text goes through, without the vocabulary."""
    backend = tokenizer.backend
    parts = (backend.normalizer, backend.pre_tokenizer)
    return type(backend.model).__name__, [part and json.loads(part.__getstate__()) for part in parts]
