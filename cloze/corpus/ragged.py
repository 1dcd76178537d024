"""Ragged arrays: many short runs that lie one after another in one flat array. Pure."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def ranges(starts_N: Ints, lengths_N: Ints) -> Ints:
    """The indices start, start + 1, …, start + length - 1 of every run, one run after another: [sum of lengths]."""
    ends_N = np.cumsum(lengths_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    return np.repeat(starts_N - (ends_N - lengths_N), lengths_N) + np.arange(total)


def offsets(lengths_N: npt.NDArray[np.integer]) -> Ints:
    """Where each run starts, and where the last one ends: [N + 1]."""
    result = np.zeros(len(lengths_N) + 1, np.int64)
    np.cumsum(lengths_N, out=result[1:])
    return result
