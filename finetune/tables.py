"""Tables of scores over seeds, in Markdown: the median, and the mean with its standard error.

A bad seed moves a mean of three by much and its median by little (Dodge et al. 2020): so the median stands first.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = "mse"  # ends of the names of scores that are no shares


def shown(name: str, scores: Sequence[float]) -> str:
    """`71.2 (70.9 ± 0.6)`: median, mean and standard error, in percent; of a single seed its score alone."""
    percent = 1 if name.endswith(_PLAIN) else 100
    digits = 4 if percent == 1 else 1
    median = f"{percent * statistics.median(scores):.{digits}f}"
    if len(scores) < 2:
        return median
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    return f"{median} ({percent * statistics.fmean(scores):.{digits}f} ± {percent * error:.{digits}f})"


def of_seeds(body: Mapping[str, Any], name: str) -> list[float]:
    """A score of every seed of a metrics.json."""
    return [scores[name] for scores in body["by_seed"].values()]


def legend(num_seeds: int) -> str:
    """What `shown` shows."""
    if num_seeds == 1:
        return "of one seed"
    return f"median of {num_seeds} seeds, in brackets mean and standard error"
