"""What guessing reaches on the held-out samples: the yardstick beside every evaluation.

A model that knows word frequencies and nothing else has their entropy as its loss. Below it by little (the topic of a
text is worth some tenths of a nat) is the plateau on which fresh encoders stay for long; well below it is language.
Knows corpora; knows neither models nor runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cloze.corpus.manifest import VAL, read_manifest
from cloze.corpus.shards import Split


class Baseline(NamedTuple):
    """The best that no reading of the text can beat."""

    mlm_loss: float  # entropy of the masked tokens' own frequencies, nats
    mlm_accuracy: float  # share of the most frequent of them
    nsp_accuracy: float  # share of the more frequent label; 1 where there are no pairs


def mean_baseline(corpora: Sequence[Path], max_samples: int) -> Baseline | None:
    """The mean over the corpora that have held-out samples, as a mixture's evaluations are; None without any."""
    found = [one for corpus in corpora if (one := held_out_baseline(corpus, max_samples))]
    return Baseline(*(sum(column) / len(found) for column in zip(*found, strict=True))) if found else None


def held_out_baseline(corpus: Path, max_samples: int) -> Baseline | None:
    """Guessing, on the first `max_samples` held-out samples (0: all) and their first draw of masks.

    None where the corpus has no held-out samples.
    """
    manifest = read_manifest(corpus)
    if VAL not in manifest.splits or not manifest.splits[VAL].samples:
        return None
    split = Split(corpus, manifest, VAL)
    count = min(len(split), max_samples or len(split))
    counts_V = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    random_next = 0
    for part in np.array_split(np.arange(count, dtype=np.int64), -(-count // 1024)):
        samples = split.gather(part, 0)
        drawn = samples.tokens_T, samples.lengths_Nx2, samples.ids_N, 0, samples.word_starts_T
        masks = samples.masks or manifest.draw(*drawn)
        totals_N = samples.lengths_Nx2[:, 1].astype(np.int64)
        starts_N = np.cumsum(totals_N) - totals_N
        masked_M = np.repeat(starts_N, masks.counts_N) + masks.positions_M
        counts_V += np.bincount(samples.tokens_T[masked_M], minlength=len(counts_V))
        random_next += int(samples.random_next_N.sum())
    shares = counts_V[counts_V > 0] / counts_V.sum()
    random_share = random_next / count
    return Baseline(
        mlm_loss=float(-(shares * np.log(shares)).sum()),
        mlm_accuracy=float(shares.max()),
        nsp_accuracy=max(random_share, 1 - random_share),
    )
