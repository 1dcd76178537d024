"""`branch_from`: the samples, the optimizer and the step of the other run, and a schedule of one's own from there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.optim.schedule import learning_rate
from tests.support import TINY, Result, Trainer

DECAY = ("run=decay", "schedule=wsd_sqrt", "schedule.decay_fraction=0.5", "steps=6")


def weights(result: Result, step: int) -> dict[str, torch.Tensor]:
    return load_file(result.run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    return (
        f"data.path={corpus}",
        f"runs_root={tmp_path_factory.mktemp('branch')}",
        "model.dropout=0.1",
        "schedule.warmup_fraction=0.05",
    )


@pytest.fixture(scope="module")
def stable(trainer: Trainer, overrides: Sequence[str]) -> Result:
    """Five of twenty steps at a constant rate, saved after 3 by its share of the run."""
    result = trainer.run(*overrides, "schedule=constant", "steps=20", "stop_at=5", "checkpoint.at=[0.15]")
    assert result.code == 75, result.stderr
    return result


def test_it_goes_on_as_the_other_run_would_have(trainer: Trainer, overrides: Sequence[str], stable: Result) -> None:
    """To the bit: the same rate, so the same weights. The other run keeps its files."""
    before = {path: path.stat().st_mtime_ns for path in stable.run.rglob("*") if path.name != ".lock"}
    mother = stable.run / "checkpoints" / "step-00000003"
    same = ("run=same", "schedule=constant", "steps=20", f"branch_from={mother}")
    result = trainer.run(*overrides, *same, "stop_at=5")
    assert result.code == 75, result.stderr
    assert f"branching off {mother}: on from sample 48 of the order" in result.stderr
    assert "warning: the learning rate jumps" not in result.stderr
    assert [line["step"] for line in result.metrics] == [4, 5]
    for key in ("train/loss", "train/grad_norm", "samples", "tokens"):
        assert result.series(key) == stable.series(key)[3:]
    assert equal(weights(result, 5), weights(stable, 5))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_decay_from_the_middle_of_a_stable_run(trainer: Trainer, overrides: Sequence[str], stable: Result) -> None:
    """Killed on the way it goes on from its own checkpoint, not from the other run again."""
    branch = (*DECAY, f"branch_from={stable.run}/checkpoints/step-00000003")
    stopped = trainer.run(*overrides, *branch, "stop_at=4")
    assert stopped.code == 75, stopped.stderr
    result = trainer.run(*overrides, *branch)
    assert result.code == 0, result.stderr
    assert "resuming at step 4 of 6" in result.stderr
    assert "branching" not in result.stderr
    assert result.series("samples") == [64, 80, 96]
    config = cli.compose("train", TrainConfig, [*TINY, *overrides, *DECAY])
    rates = [learning_rate(step, 6, config.optim, config.schedule) for step in (3, 4, 5)]
    assert result.series("train/lr") == pytest.approx(rates)
    assert rates[0] == config.optim.lr  # the decay begins where it branches off
    assert result.series("train/loss")[:2] == stable.series("train/loss")[3:]  # each of before its own update
    assert '"schedule.kind": ["constant", "wsd_sqrt"]' in (stopped.run / "changes.jsonl").read_text()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("steps=5",), "is of step 5, and the run would end at steps=5; raise it"),
        (("seed=2",), "was trained with seed=1, now it is 2: other samples would follow"),
        (("init_from=x",), "goes on from its own weights, not from init_from; leave out one of them"),
        (("branch_from=nowhere",), "neither a run nor a checkpoint"),
    ],
)
def test_what_cannot_be_branched_off(
    trainer: Trainer, overrides: Sequence[str], stable: Result, given: Sequence[str], line: str
) -> None:
    result = trainer.run(*overrides, "run=other", "schedule=constant", f"branch_from={stable.run}", "steps=9", *given)
    assert result.code == 64
    (error,) = result.errors
    assert line in error


def test_a_decay_that_would_have_begun_before_is_warned_of(
    trainer: Trainer, overrides: Sequence[str], stable: Result
) -> None:
    late = ("run=late", "schedule=wsd", "steps=6", "schedule.decay_fraction=0.8")
    result = trainer.run(*overrides, *late, f"branch_from={stable.run}")
    assert result.code == 0, result.stderr
    assert "the learning rate jumps from 3.0e-03 to 6.2e-04 at step 5, where the run branches off" in result.stderr
    assert "schedule.decay_fraction=0.1667" in result.stderr
