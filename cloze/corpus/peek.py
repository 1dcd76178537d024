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
_STYLES = {"hidden": _MASKED, "other": _REPLACED, "kept": _KEPT}


class Piece(NamedTuple):
    """Some text of a sample."""

    kind: str  # plain, or to be predicted: hidden behind the mask token, shown as an other one, or kept as it is
    text: str  # the original, as one reads it
    shown: str = ""  # what the model sees in its place
    answer: str = ""  # the token to predict, as it stands in the vocabulary


class Sample(NamedTuple):
    """One sample as a person reads it."""

    heading: str
    segments: list[tuple[str, list[Piece]]]  # A, and where there is one B


def peek(directory: Path, split: str, count: int, seed: int) -> Iterator[Text]:
    """What `read_samples` gives, as a terminal shows it: in colour, shown{answer} where there is one to predict."""
    for sample in read_samples(directory, split, count, seed):
        text = Text(f"{sample.heading}\n", style=_HEADING)
        for title, pieces in sample.segments:
            text.append(title, style=_HEADING).append(" ", style="default")
            for piece in pieces:
                if piece.kind == "plain":
                    text.append(piece.text, style="default")
                else:
                    text.append(piece.shown, style=_STYLES[piece.kind]).append(f"{{{piece.answer}}}", style=_ANSWER)
            text.append("\n")
        yield text


def read_samples(directory: Path, split: str, count: int, seed: int) -> Iterator[Sample]:
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
        yield _read(_Shown(f"{split} {index}", words, begins.tolist(), shown, tokenizer), sample, manifest)


class _Shown(NamedTuple):
    """A sample's tokens, those that begin a word, and what the model sees where it must guess."""

    name: str
    words: Sequence[str]
    begins: Sequence[bool]
    shown: dict[int, str]
    tokenizer: CorpusTokenizer


def _token(tokenizer: CorpusTokenizer, token: int) -> str:
    return tokenizer.backend.id_to_token(token) or f"<{token}>"


def _read(what: _Shown, sample: Samples, manifest: Manifest) -> Sample:
    """Spaces stand between words: where words are masked whole, those of Chinese too."""
    first, total = sample.lengths_Nx2[0].tolist()
    separators = manifest.tokenizer.separators if first < total else 1
    label = _LABELS[manifest.objective][int(sample.random_next_N[0])]
    sides = (("A", range(1, first - separators)), ("B", range(first, total - 1)))
    return Sample(
        f"{what.name}: {label}, {total} tokens, {len(what.shown)} to predict",
        [(title, [*_pieces(what, positions)]) for title, positions in sides if len(positions)],
    )


def _pieces(what: _Shown, positions: Sequence[int]) -> Iterator[Piece]:
    """Text between two tokens to predict is one piece."""
    kind, plain = what.tokenizer.kind, ""
    for position in positions:
        is_first, word, shown = position == positions[0], what.words[position], what.shown.get(position)
        plain += " " if what.begins[position] and not is_first else ""
        read = kind.readable(word if is_first else word.removeprefix(kind.continuation))
        if shown is None:
            plain += read
            continue
        if plain:
            yield Piece("plain", plain)
        plain = ""
        how = "hidden" if shown == what.tokenizer.specials.mask else "kept" if shown == word else "other"
        yield Piece(how, read, kind.readable(shown), kind.readable(word))
    if plain:
        yield Piece("plain", plain)
