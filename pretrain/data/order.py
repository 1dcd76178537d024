"""Which sample stands at which position of the run: a pure function, so resuming is "start at position i".

A run reads positions 0, 1, 2, … for ever. Epoch e reads pass e mod P of the corpus; inside an epoch the order is a
keyed pseudo-random permutation: a four-round generalized Feistel network with cycle walking (Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002, sections 3 and 5). A perfect global shuffle in O(1) memory, the
same for any number of ranks.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.masking import mix64

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HIGH_HALF = np.uint64(32)


class Place(NamedTuple):
    """Where N positions lie."""

    epochs_N: I64
    samples_N: I64  # index of the sample in its epoch's pass


def sample_at(seed: int, epoch: int, positions_N: I64, num_samples: int) -> I64:
    """The sample indices at `positions_N` (each in [0, num_samples)) of an epoch: a bijection for each seed, epoch."""
    rows = np.uint64(math.isqrt(num_samples - 1) + 1)
    columns = np.uint64(-(-num_samples // int(rows)))
    keys = _round_keys(seed, epoch)
    values = _feistel(positions_N.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(values >= num_samples)
    while len(outside):  # cycle walking: the domain is hardly larger than num_samples, so few walk, and not far
        walked = _feistel(values[outside], rows, columns, keys)
        values[outside] = walked
        outside = outside[walked >= num_samples]
    return values.astype(np.int64)


def locate(seed: int, positions_N: I64, pass_sizes: Sequence[int]) -> Place:
    """Epoch and sample of run positions (each >= 0), for passes of `pass_sizes` samples that follow one another."""
    epochs_N, offsets_N = epoch_offsets(positions_N, pass_sizes)
    samples_N = np.empty_like(offsets_N)
    for epoch in np.unique(epochs_N).tolist():
        here = epochs_N == epoch
        samples_N[here] = sample_at(seed, epoch, offsets_N[here], pass_sizes[epoch % len(pass_sizes)])
    return Place(epochs_N, samples_N)


def epoch_offsets(positions_N: I64, pass_sizes: Sequence[int]) -> tuple[I64, I64]:
    """(epoch, offset in it) of run positions: epochs follow one another without a gap."""
    ends = np.cumsum(np.asarray(pass_sizes, dtype=np.int64))
    if not len(ends) or ends[-1] < 1:
        raise ValueError("a run needs at least one sample")
    cycles_N, within_N = np.divmod(positions_N, ends[-1])
    passes_N = np.searchsorted(ends, within_N, side="right")
    return cycles_N * len(ends) + passes_N, within_N - np.concatenate([[0], ends[:-1]])[passes_N]


def lane_bounds(num_samples: int, lanes: int) -> I64:
    """Where each of `lanes` equal stretches of an epoch's stream begins, and the end: [lanes + 1].

    Offset q of the epoch is the (q div lanes)-th sample of lane q mod lanes.
    """
    return np.concatenate([[0], np.cumsum(num_samples // lanes + (np.arange(lanes) < num_samples % lanes))])


def window_order(seed: int, epoch: int, lane: int, window: int, size: int) -> I64:
    """The order in which the `size` samples of a lane's window are read: a seeded permutation."""
    key = np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    for part in (epoch, lane, window):
        key = mix64(mix64(key + _GOLDEN) ^ np.asarray([part], dtype=np.uint64))
    return np.argsort(mix64(key + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN), kind="stable")


def micro_batch_positions(
    index: int,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    interleaved: bool = False,
) -> I64:
    """Run positions of micro-batch `index` (counted from the start of the run) of a rank.

    Step s covers positions [s * global_batch_size, (s + 1) * global_batch_size); its micro-batch m takes
    world_size * micro_batch_size of them, rank by rank, or in turns where `interleaved`, so that a rank meets the same
    lanes again and again. Either way the global batches do not depend on the layout.
    """
    accumulation = global_batch_size // (micro_batch_size * world_size)
    step, micro = divmod(index, accumulation)
    first = step * global_batch_size + micro * world_size * micro_batch_size
    if interleaved:
        return first + rank + world_size * np.arange(micro_batch_size, dtype=np.int64)
    return first + rank * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    state = mix64(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN)
    state = mix64(state ^ mix64(np.asarray([epoch], dtype=np.uint64) + _GOLDEN))
    keys = []
    for _ in range(_ROUNDS):
        state = mix64(state + _GOLDEN)
        keys.append(state[0])
    return tuple(keys)


def _feistel(values: U64, rows: np.uint64, columns: np.uint64, keys: Sequence[np.uint64]) -> U64:
    """A permutation of 0 … rows * columns - 1: each round turns one coordinate by a hash of the other."""
    row, column = np.divmod(values, columns)
    for turn, key in enumerate(keys):
        if turn % 2:
            column = (column + (mix64(row ^ key) >> _HIGH_HALF)) % columns
        else:
            row = (row + (mix64(column ^ key) >> _HIGH_HALF)) % rows
    return row * columns + column
