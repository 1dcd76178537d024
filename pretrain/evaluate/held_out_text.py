"""Pseudo-perplexity of text that a model was not trained on: lines of files, or samples of a held-out split."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloze.corpus.manifest import Manifest
from cloze.corpus.shards import Split
from cloze.errors import UserError
from pretrain.evaluate.pll import F64, I64, UNIT, Encoded, encode


class Perplexity(NamedTuple):
    """Salazar et al. 2020, section 2.3. Per token it depends on the vocabulary, per word it does not."""

    texts: int
    tokens: int
    words: int
    nats_per_token: float
    per_token: float
    per_word: float


def perplexity(texts: Sequence[Encoded], scores_N: F64) -> Perplexity:
    """`scores_N` are log-likelihoods in multiples of `UNIT`."""
    tokens = sum(text.num_scored for text in texts)
    words = sum(len({*text.words_T.tolist()} - {-1}) for text in texts)
    nats = -float(scores_N.sum()) * UNIT
    return Perplexity(len(texts), tokens, words, nats / tokens, _exp(nats / tokens), _exp(nats / words))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def lines_of(file: str, backend: Any, *, most: int, max_positions: int) -> list[Encoded]:
    """Each line that is not empty is a text, cut into pieces as long as the model where it is longer.

    Of more than `most` lines (0: all), so many at even distances. Raises `UserError` for a file that cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"text={file}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"text={file}: cannot be read ({error.strerror}); name a text file") from None
    lines = [line for line in text.split("\n") if line.strip()]
    encoded = encode(backend, [lines[i] for i in _spread(len(lines), most)])
    found = [piece for text in encoded for piece in _cut(text, max_positions) if piece.num_scored]
    if not found:
        raise UserError(f"text={file}: holds no text; name another file")
    return found


def _cut(text: Encoded, max_positions: int) -> list[Encoded]:
    if len(text.ids_T) <= max_positions:
        return [text]
    inner, step = slice(1, -1), max_positions - 2
    pieces = []
    for start in range(0, len(text.ids_T) - 2, step):
        ids, words = text.ids_T[inner][start : start + step], text.words_T[inner][start : start + step]
        whole = np.concatenate([text.ids_T[:1], ids, text.ids_T[-1:]]), np.concatenate([[-1], words, [-1]])
        pieces.append(Encoded(*whole, len(ids) + 2))
    return pieces


def samples_of(directory: Path, manifest: Manifest, split: str, *, continues_V: Any, most: int) -> list[Encoded]:
    """Samples of a split as they are, pairs with both segments; `continues_V` says which tokens go on with a word."""
    if split not in manifest.splits or not manifest.splits[split].samples:
        raise UserError(f"split={split}: {directory} has no such samples; there are {', '.join(manifest.splits)}")
    samples = Split(directory, manifest, split)
    indices = np.asarray(_spread(len(samples), most), np.int64)
    gathered = samples.gather(indices, 0)
    ends_N = np.cumsum(gathered.lengths_Nx2[:, 1], dtype=np.int64)
    specials = [manifest.tokenizer.pad_id, manifest.tokenizer.cls_id, manifest.tokenizer.sep_id]
    found = []
    for end, (first, total) in zip(ends_N.tolist(), gathered.lengths_Nx2.tolist(), strict=True):
        ids_T: I64 = gathered.tokens_T[end - total : end].astype(np.int64)
        words_T = np.where(np.isin(ids_T, specials), -1, np.cumsum(~continues_V[ids_T]))
        found.append(Encoded(ids_T, words_T, first if manifest.tokenizer.token_types else total))
    return found


def _spread(count: int, most: int) -> list[int]:
    taken: list[int] = (np.arange(min(count, most or count)) * count // max(1, min(count, most or count))).tolist()
    return taken


def table(rows: Mapping[str, Mapping[str, Perplexity]]) -> list[str]:
    """By text and by what scored it, for people."""
    cells = [["Pseudo-perplexity", "texts", "tokens", "words", "nats per token", "per token", "per word"]]
    for name, found in rows.items():
        cells.append([name, *[""] * 6])
        for label, one in found.items():
            counts = f"{one.texts:,}", f"{one.tokens:,}", f"{one.words:,}"
            cells.append(
                [f"  {label}", *counts, f"{one.nats_per_token:.3f}", f"{one.per_token:,.1f}", f"{one.per_word:,.1f}"]
            )
    widths = [max(len(row[column]) for row in cells if column or row[1]) for column in range(7)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
