"""What the user left open is, on a resume, as it was in the run; what the user gave is what was given."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cloze import cli
from pretrain.config import Precision, TrainConfig, as_data
from pretrain.resume import with_choices_of


def config(*overrides: str) -> TrainConfig:
    return cli.compose("train", TrainConfig, ["run=r", "data.path=d", "model=tiny", *overrides])


def saved(then: TrainConfig | dict[str, Any]) -> Any:
    values = then if isinstance(then, dict) else as_data(asdict(then))
    return SimpleNamespace(config_yaml=yaml.safe_dump(values))


def test_a_rate_by_width_goes_on_as_the_run_began() -> None:
    """Also of a version whose default was another one."""
    before = saved(config("optim.lr=1e-4", "precision=bf16"))
    now = with_choices_of(config(), before, precision_is_open=True)
    assert now.optim.lr == 1e-4
    assert now.precision is Precision.bf16
    assert config().optim.lr == 4e-3


@pytest.mark.parametrize("given", ["optim.lr=4e-3", "optim.lr=2e-3"])
def test_what_is_given_counts(given: str) -> None:
    asked = config(given, "precision=fp32")
    now = with_choices_of(asked, saved(config("optim.lr=1e-4", "precision=bf16")), precision_is_open=False)
    assert now == asked


def test_what_the_run_does_not_tell_is_chosen_anew() -> None:
    asked = config()
    for then in (
        {},
        {"optim": {"kind": "muon", "lr": 1.0}},
        {"optim": {"kind": "adamw", "lr": None}, "precision": "x"},
    ):
        assert with_choices_of(asked, saved(then), precision_is_open=True) == asked
