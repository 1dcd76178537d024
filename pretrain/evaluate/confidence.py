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


def spearman(gold_N: Floats, given_N: Floats, drawn_BxN: npt.NDArray[np.int64]) -> Floats:
    """Spearman's rank correlation of each draw, [B]; equal numbers share their mean rank; 0 where one does not vary."""
    from scipy.stats import rankdata

    scores_B = np.empty(len(drawn_BxN))
    for b, drawn_N in enumerate(drawn_BxN):  # a matrix of all ranks would be large, and no quicker
        a_N, b_N = rankdata(gold_N[drawn_N]), rankdata(given_N[drawn_N])
        a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
        scale = np.sqrt((a_N @ a_N) * (b_N @ b_N))
        scores_B[b] = a_N @ b_N / scale if scale else 0.0
    return scores_B
