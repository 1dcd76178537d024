"""Has the model left the plateau of word frequencies? A verdict on a run's held-out losses, and one line of advice.

A fresh BERT first learns how frequent words are, then what a text is about, and stays there, for tens of millions of
tokens where nothing helps it to learn which tokens are near (docs/stuck.md). Its loss looks as if it had converged.
Pure: evaluations in, words out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pretrain.evaluate.baseline import Baseline

LEFT_NATS = 0.7  # below the frequencies' entropy: what frequencies and topic together gave stayed within 0.5 of it
_PATIENCE_TOKENS = 3_000_000  # the best recipe leaves the plateau in 2 million; before that there is nothing to say
_DIVERGED_NATS = 0.3  # above the frequencies' entropy: worse than a table of counts


class Evaluation(NamedTuple):
    """One held-out evaluation of a run."""

    tokens: int  # consumed in training until then
    mlm_loss: float  # nats per masked token


class Verdict(NamedTuple):
    """Where a run stands against its baseline."""

    state: str  # "early", "plateau", "left" or "diverged"
    left_at_tokens: int | None  # at the first evaluation off the plateau
    line: str  # for people


def judge(evaluations: Sequence[Evaluation], baseline: Baseline) -> Verdict | None:
    """The verdict on evaluations in the order of training; None where there is none."""
    if not evaluations:
        return None
    last = evaluations[-1]
    below = baseline.mlm_loss - last.mlm_loss
    left = next((e.tokens for e in evaluations if e.mlm_loss <= baseline.mlm_loss - LEFT_NATS), None)
    against = f"held-out MLM loss {last.mlm_loss:.3f}, word frequencies alone {baseline.mlm_loss:.3f}"
    if not math.isfinite(last.mlm_loss) or (-below > _DIVERGED_NATS and last.tokens >= _PATIENCE_TOKENS):
        return Verdict(
            "diverged", left, f"diverged: {against}: worse than guessing; lower optim.lr or lengthen the warm-up"
        )
    if below >= LEFT_NATS:
        assert left is not None
        return Verdict("left", left, f"off the plateau since {left / 1e6:.1f}M tokens: {against}")
    if last.tokens < _PATIENCE_TOKENS:
        return Verdict("early", left, f"{against}: too early to tell")
    if left is not None:
        return Verdict(
            "plateau",
            left,
            f"back on the plateau, which it had left at {left / 1e6:.1f}M tokens: {against}; lower optim.lr",
        )
    return Verdict(
        "plateau",
        None,
        f"on the plateau: {against}: it knows frequencies and topics, not word order. Try recipe=fast (a distance bias "
        "that is annealed away), a higher optim.lr, or more steps; docs/stuck.md tells which",
    )
