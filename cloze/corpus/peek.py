"""Samples of a corpus as the model will see them, decoded, in colour on a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.text import Text
from tokenizers import Tokenizer

from cloze.corpus.manifest import Manifest, read_manifest
from cloze.corpus.shards import Samples, Split, masks_of
from cloze.corpus.tokenizer import MASK, load_tokenizer
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
    tokenizer = load_tokenizer(directory / "tokenizer").backend
    samples = Split(directory, manifest, split)
    for index in np.random.default_rng(seed).permutation(len(samples))[:count]:
        sample = samples.gather(np.asarray([index]), 0)
        masks = masks_of(sample, manifest, 0)
        words = [_word(tokenizer, token) for token in sample.tokens_T.tolist()]
        shown = {
            position: _word(tokenizer, token)
            for position, token in zip(masks.positions_M.tolist(), masks.tokens_M.tolist(), strict=True)
        }
        begins = sample.word_starts_T
        if begins is None:
            begins = np.asarray([not word.startswith("##") for word in words])
        yield _rendered(f"{split} {index}", sample, words, begins.tolist(), shown, manifest)


def _word(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.id_to_token(token) or f"<{token}>"


def _rendered(
    name: str, sample: Samples, words: Sequence[str], begins: Sequence[bool], shown: dict[int, str], manifest: Manifest
) -> Text:
    """Spaces stand between words: where words are masked whole, those of Chinese too."""
    first, total = sample.lengths_Nx2[0].tolist()
    label = _LABELS[manifest.objective][int(sample.random_next_N[0])]
    text = Text(f"{name}: {label}, {total} tokens, {len(shown)} to predict\n", style=_HEADING)
    for title, positions in (("A", range(1, first - 1)), ("B", range(first, total - 1))):
        if len(positions):
            text.append(title, style=_HEADING)
            for position in positions:
                text.append(" " if begins[position] or position == positions[0] else "")
                _append_word(text, words[position], shown.get(position), position == positions[0])
            text.append("\n")
    return text


def _append_word(text: Text, word: str, shown: str | None, is_first: bool) -> None:
    """The word; where it is to be predicted, what is shown instead, and the answer in braces."""
    if shown is None:
        text.append(word if is_first else word.removeprefix("##"), style="default")
        return
    style = _MASKED if shown == MASK else _KEPT if shown == word else _REPLACED
    text.append(shown, style=style).append(f"{{{word}}}", style=_ANSWER)
