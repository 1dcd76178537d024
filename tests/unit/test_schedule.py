"""The learning rate: continuous, and equal to a slow reference."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import entry
from pretrain.config import OptimConfig, ScheduleConfig, TrainConfig
from pretrain.schedule import learning_rate, rate_between

CONFIG = entry.compose("train", TrainConfig, ["run=r", "data.path=d"])


def parts(lr: float, warmup: float, final: float) -> tuple[OptimConfig, ScheduleConfig]:
    return replace(CONFIG.optim, lr=lr), replace(CONFIG.schedule, warmup_fraction=warmup, final_fraction=final)


def whole(steps: int, lr: float, warmup: float, final: float) -> list[float]:
    return [learning_rate(step, steps, *parts(lr, warmup, final)) for step in range(steps)]


@pytest.mark.parametrize("steps", [10, 100, 1000, 7038])
@pytest.mark.parametrize("warmup", [0.1, 0.2843, 0.5])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_peak_is_reached_without_a_jump(steps: int, warmup: float, final: float) -> None:
    """A known defect elsewhere: after warm-up the rate fell to 0.846 of the peak at once."""
    rates = whole(steps, 2e-3, warmup, final)
    steepest = 2e-3 * max(1 / (steps * warmup), 1 / (steps * (1 - warmup)))
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= steepest * (1 + 1e-9)
    assert max(rates) == pytest.approx(2e-3, rel=1 / (steps * min(warmup, 1 - warmup)))
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(10, 1), (10, 5), (200, 20), (50, 0), (1, 0), (7, 7)])
@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
def test_equals_the_slow_reference(steps: int, warmup_steps: int, final: float) -> None:
    expected = []
    for step in range(steps):
        if step < warmup_steps:
            expected.append(0.5 * (step + 1) / warmup_steps)  # reaches the peak in its last step
        else:
            share_left = (steps - step) / (steps - warmup_steps)
            expected.append(0.5 * final + 0.5 * (1 - final) * share_left)
    assert whole(steps, 0.5, warmup_steps / steps, final) == pytest.approx(expected, rel=1e-9)


def test_ends_near_the_final_fraction() -> None:
    for final in (0.0, 0.02, 0.5, 1.0):
        rates = whole(1000, 1e-3, 0.1, final)
        assert rates[-1] == pytest.approx(1e-3 * final, abs=1e-3 / 899)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2_000_000),
    st.data(),
    st.floats(0, 10),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_always_between_zero_and_the_peak(
    steps: int, data: st.DataObject, lr: float, warmup: float, final: float
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(step, steps, *parts(lr, warmup, final))
    assert 0 <= rate <= lr * (1 + 1e-9)
    if (step + 1) / steps > warmup:
        assert rate >= lr * final * (1 - 1e-9)
    elif lr > 1e-300:
        assert rate > 0  # a step of warm-up is never lost


def test_a_budget_that_is_overspent_stays_at_the_end() -> None:
    assert rate_between(1.2, 1.3, *parts(1.0, 0.1, 0.25)) == 0.25
