"""Minimal pairs inside a run: read and checked before its first step, scored by all ranks together at any step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cloze.corpus.tokenizer import load_tokenizer
from pretrain.config import Access, TrainConfig
from pretrain.data.loader import TrainingCorpus
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.evaluate.frequencies import token_counts
from pretrain.evaluate.minimal_pairs import (
    PairSet,
    columns_of,
    encode_pairs,
    frequency_scores,
    headline,
    score_pairs,
    summary,
)
from pretrain.evaluate.pair_files import read_paradigms
from pretrain.evaluate.pll import F64, I64, Metric, Scorer

_METRIC = Metric.within_word_l2r


@dataclass(frozen=True, kw_only=True)
class RunGrammar:
    """The pairs of `eval.grammar`."""

    pairs: PairSet
    frequencies_Px2: F64 | None  # rank 0's alone
    mask_id: int
    max_positions: int
    row_tokens: int  # as many as training's micro-batches have at most

    def evaluate(self, engine: Engine, process: Process, tick: Callable[[], None]) -> dict[str, float]:
        """`eval/grammar_accuracy` and what stands beside it: docs/training.md. The same on any number of ranks.

        Collective; `tick` is called after each forward pass.
        """
        scorer = Scorer(
            logits_of=lambda batch: engine.evaluate(batch)[0],
            mask_id=self.mask_id,
            max_positions=self.max_positions,
            row_tokens=self.row_tokens,
            device=process.device,
            process=process,
            tick=tick,
        )
        scores = score_pairs(self.pairs, scorer, [_METRIC])
        found = summary(self.pairs, columns_of(self.pairs, scores, self.frequencies_Px2))
        return {f"eval/{name}": value for name, value in headline(found, _METRIC).items()}


def open_grammar(config: TrainConfig, corpus: TrainingCorpus, process: Process) -> RunGrammar | None:
    """None without `eval.grammar`. Rank 0 reads; every rank raises its `UserError` where a file cannot be used."""
    if config.eval.grammar is None:
        return None
    sources, most, positions = [config.eval.grammar], config.eval.grammar_pairs, config.model.max_positions

    def read() -> PairSet:
        paradigms = read_paradigms(sources, most=most, key="eval.grammar")
        return encode_pairs(paradigms, load_tokenizer(corpus.directory / "tokenizer").backend, positions)

    pairs = process.on_main(read)
    streamed = config.data.access is Access.stream

    def count() -> I64:
        if streamed:
            return token_counts(config.data.parts[0].path, corpus.manifest)
        counts_CxV = np.stack([token_counts(one.directory, one.manifest) for one in corpus.corpora])
        counts_V: I64 = counts_CxV.sum(axis=0)
        return counts_V

    return RunGrammar(
        pairs=pairs,
        frequencies_Px2=process.here_on_main(lambda: frequency_scores(pairs, count())),
        mask_id=corpus.manifest.tokenizer.mask_id,
        max_positions=positions,
        row_tokens=config.micro_batch_size * corpus.manifest.max_len,
    )
