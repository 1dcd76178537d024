"""A run that is no better than guessing says so, and stops where told how bad is too bad."""

import math

import pytest

from cloze import cli
from cloze.errors import TrainingError
from pretrain.config import TrainConfig
from pretrain.guessing import LossWatch

VOCABULARY = 1000
GUESS = math.log(VOCABULARY)


def watch(*overrides: str) -> LossWatch:
    return LossWatch(cli.compose("train", TrainConfig, ["run=a", "data.path=x", *overrides]), VOCABULARY)


def losses(mlm: float) -> dict[str, float]:
    return {"loss": mlm + 0.7, "mlm_loss": mlm}


@pytest.mark.parametrize("bad", [GUESS + 0.1, 376_799.0, math.inf, math.nan])
def test_a_loss_that_stays_above_guessing_is_told_once_and_at_the_end(bad: float) -> None:
    seen = watch()
    told = [seen.saw(step, step / 100, losses(bad)) for step in range(1, 101)]
    assert [step for step, line in enumerate(told, 1) if line] == [20]
    assert "no better than guessing, 6.91 (ln of the vocabulary)" in str(told[19])
    assert "\n" not in str(told[19])
    assert "no better than guessing" in str(seen.verdict())


def test_a_model_that_learns_is_left_in_peace() -> None:
    seen = watch("guard.give_up_loss=8")
    for step in range(1, 101):
        assert seen.saw(step, step / 100, losses(GUESS + 0.3 - step / 50)) is None
    assert seen.verdict() is None


def test_one_good_line_among_five_is_enough_and_the_end_is_what_counts() -> None:
    seen = watch()
    for step in range(1, 101):
        assert seen.saw(step, step / 100, losses(GUESS - 1 if step % 5 == 0 else GUESS + 1)) is None
    assert seen.verdict() is None
    seen.saw(101, 1.0, losses(GUESS + 1))
    assert seen.verdict() is not None


@pytest.mark.parametrize("bad", [9.0, math.nan, math.inf])
def test_it_gives_up_after_the_warm_up_where_told_to(bad: float) -> None:
    seen = watch("guard.give_up_loss=8", "schedule.warmup_fraction=0.3")
    for step in range(1, 30):
        seen.saw(step, step / 100, losses(bad))
    with pytest.raises(TrainingError, match=r"step 30: the loss has stayed above guard\.give_up_loss=8") as caught:
        seen.saw(30, 0.3, losses(bad))
    assert caught.value.exit_code == 70


def test_nothing_logged_nothing_said() -> None:
    assert watch().verdict() is None
