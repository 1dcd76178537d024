"""Samples of a corpus as the model will see them, decoded, in colour on a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.text import Text

from cloze.corpus.manifest import Manifest, read_manifest
from cloze.corpus.shards import Samples, Split, masks_of
from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError

_LABELS = {"nsp": ("is next", "random next"), "sop": ("in order", "swapped"), "none": ("one segment", "")}
_MASKED, _REPLACED, _KEPT, _ANSWER, _HEADING = "bold red", "bold magenta", "bold yellow", "green", "bold cyan"


def peek(directory: Path, split: str, count: int, seed: int) -> Iterator[Text]:
    """`count` samples of a split, picked at random by `seed`, as they are in the first mask draw.

    Raises `UserError` if there is no such split, or a shard is damaged.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise UserError(f"--split {split}: not in {directory}; there are {', '.join(manifest.splits)}")
    tokenizer = load_tokenizer(directory / "tokenizer")
    samples = Split(directory, manifest, split)
    for index in np.random.default_rng(seed).permutation(len(samples))[:count]:
        sample = samples.gather(np.asarray([index]), 0)
        masks = masks_of(sample, manifest, 0)
        words = [_token(tokenizer, token) for token in sample.tokens_T.tolist()]
        shown = {
            position: _token(tokenizer, token)
            for position, token in zip(masks.positions_M.tolist(), masks.tokens_M.tolist(), strict=True)
        }
        begins = sample.word_starts_T
        if begins is None:
            begins = np.asarray([tokenizer.kind.begins_word(word) for word in words])
        yield _rendered(_Shown(f"{split} {index}", words, begins.tolist(), shown, tokenizer), sample, manifest)


class _Shown(NamedTuple):
    """A sample's tokens, those that begin a word, and what the model sees where it must guess."""

    name: str
    words: Sequence[str]
    begins: Sequence[bool]
    shown: dict[int, str]
    tokenizer: CorpusTokenizer


def _token(tokenizer: CorpusTokenizer, token: int) -> str:
    return tokenizer.backend.id_to_token(token) or f"<{token}>"


def _rendered(what: _Shown, sample: Samples, manifest: Manifest) -> Text:
    """Spaces stand between words: where words are masked whole, those of Chinese too."""
    name, words, begins, shown, tokenizer = what
    first, total = sample.lengths_Nx2[0].tolist()
    separators = manifest.tokenizer.separators if first < total else 1
    label = _LABELS[manifest.objective][int(sample.random_next_N[0])]
    text = Text(f"{name}: {label}, {total} tokens, {len(shown)} to predict\n", style=_HEADING)
    for title, positions in (("A", range(1, first - separators)), ("B", range(first, total - 1))):
        if len(positions):
            text.append(title, style=_HEADING)
            for position in positions:
                text.append(" " if begins[position] or position == positions[0] else "")
                is_first = position == positions[0]
                _append_word(text, tokenizer, words[position], shown.get(position), is_first)
            text.append("\n")
    return text


def _append_word(text: Text, tokenizer: CorpusTokenizer, word: str, shown: str | None, is_first: bool) -> None:
    """The word; where it is to be predicted, what is shown instead, and the answer in braces."""
    kind, mask = tokenizer.kind, tokenizer.specials.mask
    if shown is None:
        text.append(kind.readable(word if is_first else word.removeprefix(kind.continuation)), style="default")
        return
    style = _MASKED if shown == mask else _KEPT if shown == word else _REPLACED
    text.append(kind.readable(shown), style=style).append(f"{{{kind.readable(word)}}}", style=_ANSWER)
