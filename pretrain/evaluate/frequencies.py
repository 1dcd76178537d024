"""What word frequencies alone give a text: the corpus' own counts of each token, and the log-likelihood by them.

A model that knows nothing else already decides many minimal pairs. Knows corpora; knows neither models nor runs.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cloze.corpus.manifest import Manifest, pass_name
from cloze.corpus.shards import Split
from pretrain.evaluate.pll import F64, I64, UNIT, Encoded

_COUNTED_TOKENS = 20_000_000  # of a larger corpus, so many, from all over it
_RUN_SAMPLES = 256  # read side by side


def token_counts(place: Path | str, manifest: Manifest) -> I64:
    """How often each token stands in the first pass, [vocabulary]; `place` is the corpus' directory, or its URL."""
    split = Split(place, manifest, pass_name(0), cached_blocks=2)
    counts_V = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    runs = -(-len(split) // _RUN_SAMPLES)
    tokens_of_run = max(1, manifest.splits[pass_name(0)].tokens // max(1, runs))
    read = min(runs, -(-_COUNTED_TOKENS // tokens_of_run))
    for run in (np.arange(read) * runs // max(1, read)).tolist():
        indices = np.arange(run * _RUN_SAMPLES, min((run + 1) * _RUN_SAMPLES, len(split)), dtype=np.int64)
        counts_V += np.bincount(split.gather(indices, 0).tokens_T, minlength=len(counts_V))
    counts_V[list({*manifest.tokenizer.special_ids} - {manifest.tokenizer.unk_id})] = 0
    return counts_V


def log_likelihoods(counts_V: I64, texts: Iterable[Encoded]) -> F64:
    """Sum over the scored tokens of log((count + 1) / (all + vocabulary)), in multiples of `UNIT` nats, [texts].

    As integers: sentences of the same words tie, whatever their order.
    """
    values_V = np.round(np.log((counts_V + 1) / (counts_V.sum() + len(counts_V))) / UNIT)
    return np.asarray([values_V[text.ids_T[text.words_T >= 0]].sum() for text in texts])
