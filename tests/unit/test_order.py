"""The order of samples: a bijection, equal to slow references, the same for any layout of ranks."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import locate, micro_batch_positions, sample_at

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x %= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def slow_sample_at(seed: int, epoch: int, position: int, num_samples: int) -> int:
    rows = math.isqrt(num_samples)
    rows += rows * rows < num_samples
    columns = math.ceil(Fraction(num_samples, rows))
    state = mix(seed + GOLDEN)
    state = mix(state ^ mix(epoch + GOLDEN))
    keys = []
    for _ in range(4):
        state = mix(state + GOLDEN)
        keys.append(state)
    value = position
    while True:
        row, column = divmod(value, columns)
        row = (row + mix(column ^ keys[0]) // 2**32) % rows
        column = (column + mix(row ^ keys[1]) // 2**32) % columns
        row = (row + mix(column ^ keys[2]) // 2**32) % rows
        column = (column + mix(row ^ keys[3]) // 2**32) % columns
        value = row * columns + column
        if value < num_samples:
            return value


def slow_walk(seed: int, pass_sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(epoch, sample) of positions 0 … count-1, epoch by epoch."""
    found: list[tuple[int, int]] = []
    epoch = 0
    while len(found) < count:
        size = pass_sizes[epoch % len(pass_sizes)]
        found += [(epoch, slow_sample_at(seed, epoch, position, size)) for position in range(size)]
        epoch += 1
    return found[:count]


SIZES = [*range(1, 70), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4097, 10_007, 65_536, 65_537]


@pytest.mark.parametrize("num_samples", SIZES)
def test_bijection(num_samples: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (1, 1), (2**63 - 1, 10**6)):
        samples = sample_at(seed, epoch, np.arange(num_samples), num_samples)
        assert np.array_equal(np.sort(samples), np.arange(num_samples))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**31),
    st.integers(1, 2**32).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=5))),
)
def test_equals_the_slow_reference(seed: int, epoch: int, case: tuple[int, list[int]]) -> None:
    num_samples, positions = case
    found = sample_at(seed, epoch, np.asarray(positions, np.int64), num_samples)
    assert found.tolist() == [slow_sample_at(seed, epoch, position, num_samples) for position in positions]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
def test_locate_equals_a_walk_through_epochs_and_passes(seed: int, pass_sizes: list[int]) -> None:
    walk = slow_walk(seed, pass_sizes, 100)
    place = locate(seed, np.arange(100), pass_sizes)
    assert list(zip(place.epochs_N.tolist(), place.samples_N.tolist(), strict=True)) == walk
    order = np.random.default_rng(seed % 2**32).permutation(100)
    shuffled = locate(seed, order, pass_sizes)
    assert [walk[i] for i in order] == list(zip(shuffled.epochs_N.tolist(), shuffled.samples_N.tolist(), strict=True))


def test_no_sample_at_all() -> None:
    for sizes in ([], [0], [0, 0]):
        with pytest.raises(ValueError, match="at least one sample"):
            locate(0, np.arange(3), sizes)


def test_epochs_and_seeds_have_other_orders() -> None:
    """Two orders put a sample in the same place as often as chance has it: about once."""
    orders = [sample_at(seed, epoch, np.arange(5_000), 5_000) for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1))]
    for i, one in enumerate(orders):
        assert not np.array_equal(one, np.arange(5_000))
        for other in orders[:i]:
            assert (one == other).sum() < 10
            # Neighbours of one order are not neighbours of the other either.
            there = np.argsort(other)[one]
            assert (np.abs(np.diff(there)) == 1).sum() < 15


def test_the_shuffle_is_uniform() -> None:
    """Where sample 0 of 16 stands over 6,400 epochs: chi-squared with 15 degrees, within five deviations."""
    places = [int(np.argmin(sample_at(9, epoch, np.arange(16), 16))) for epoch in range(6_400)]
    counts = np.bincount(places, minlength=16)
    assert abs(float(((counts - 400) ** 2 / 400).sum()) - 15) < 5 * (2 * 15) ** 0.5


# Layouts


@pytest.mark.parametrize("global_batch_size", [24, 48])
def test_global_batches_do_not_depend_on_the_layout(global_batch_size: int) -> None:
    sizes, steps = [101, 37], 12
    whole = locate(5, np.arange(steps * global_batch_size), sizes)
    reference = list(zip(whole.epochs_N.tolist(), whole.samples_N.tolist(), strict=True))
    layouts = 0
    for world_size in (1, 2, 3, 4, 8):
        for micro_batch_size in (1, 2, 3, 4, 6, 8, 12, 24):
            if global_batch_size % (world_size * micro_batch_size):
                continue
            layouts += 1
            accumulation = global_batch_size // (world_size * micro_batch_size)
            for step in range(steps):
                dealt = [
                    micro_batch_positions(
                        step * accumulation + micro,
                        rank=rank,
                        world_size=world_size,
                        micro_batch_size=micro_batch_size,
                        global_batch_size=global_batch_size,
                    )
                    for micro in range(accumulation)
                    for rank in range(world_size)
                ]
                assert all(len(part) == micro_batch_size for part in dealt)
                place = locate(5, np.concatenate(dealt), sizes)
                batch = list(zip(place.epochs_N.tolist(), place.samples_N.tolist(), strict=True))
                assert batch == reference[step * global_batch_size : (step + 1) * global_batch_size]
    assert layouts > 15


def test_every_sample_once_per_epoch_over_ranks() -> None:
    """3 ranks, batches that do not divide the epoch of 50: of 6 epochs each holds each sample once."""
    positions = [
        micro_batch_positions(index, rank=rank, world_size=3, micro_batch_size=4, global_batch_size=12)
        for rank in range(3)
        for index in range(25)
    ]
    place = locate(1, np.concatenate(positions), [50])
    for epoch in range(6):
        assert sorted(place.samples_N[place.epochs_N == epoch].tolist()) == list(range(50))
