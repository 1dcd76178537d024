"""How sure a score is: the bootstrap over examples (Efron and Tibshirani 1993, chapter 13). Pure numpy.

Draws are made once and shared by all that is scored on the same examples: the interval of a difference is then that of
paired scores. Shapes: B draws, N examples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_DRAWS = 1000
_LEVEL = 0.95


class Interval(NamedTuple):
    """A score of all examples, and between which values it lies in 95% of the draws."""

    value: float
    low: float
    high: float


def draw_examples(num_examples: int, seed: int, num_draws: int = NUM_DRAWS) -> npt.NDArray[np.int64]:
    """Examples drawn with replacement, i64 [B, N]; the first row is all of them in order, whose score is the score."""
    drawn_BxN = np.random.default_rng(seed).integers(num_examples, size=(num_draws + 1, num_examples))
    drawn_BxN[0] = np.arange(num_examples)
    return drawn_BxN


def interval(scores_B: Floats) -> Interval:
    """Of the scores of `draw_examples`' rows."""
    low, high = np.quantile(scores_B[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(scores_B[0]), float(low), float(high))


def times_drawn(drawn_BxN: npt.NDArray[np.int64]) -> Floats:
    """How often each example was drawn, f64 [B, N]."""
    num_examples = drawn_BxN.shape[1]
    return np.stack([np.bincount(drawn_N, minlength=num_examples) for drawn_N in drawn_BxN]).astype(np.float64)


def spearman(gold_N: Floats, given_N: Floats, drawn_BxN: npt.NDArray[np.int64]) -> Floats:
    """Spearman's rank correlation of each draw, [B]; equal numbers share their mean rank; 0 where one does not vary."""
    times_BxN = times_drawn(drawn_BxN)
    num_examples = drawn_BxN.shape[1]
    a_BxN, b_BxN = (_ranks(values_N, times_BxN) - (num_examples + 1) / 2 for values_N in (gold_N, given_N))
    scale_B = np.sqrt((times_BxN * a_BxN**2).sum(1) * (times_BxN * b_BxN**2).sum(1))
    products_B = (times_BxN * a_BxN * b_BxN).sum(1)
    return np.asarray(np.divide(products_B, scale_B, out=np.zeros_like(scale_B), where=scale_B > 0))


def _ranks(values_N: Floats, times_BxN: Floats) -> Floats:
    """The rank that each example has in each draw, [B, N]: sorted once, not in each draw."""
    order_N = np.argsort(values_N, kind="stable")
    starts = np.flatnonzero(np.diff(values_N[order_N], prepend=-np.inf))  # of runs of equal numbers
    runs_BxR = np.add.reduceat(times_BxN[:, order_N], starts, axis=1)
    ranks_BxR = np.cumsum(runs_BxR, axis=1) - (runs_BxR - 1) / 2
    run_N = np.empty(len(values_N), np.int64)
    run_N[order_N] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values_N)))
    return np.asarray(ranks_BxR[:, run_N])
