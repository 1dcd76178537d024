"""fp16 with a dynamic loss scale. DeepSpeed refuses it on CPUs, which can compute it: told so, it runs here."""

import json
from pathlib import Path

import pytest

from tests.dist.test_stages import POISON, Plain
from tests.support import Trainer

FP16 = """
import torch
from deepspeed.accelerator import get_accelerator

import pretrain.engine.engine

accelerator = get_accelerator()
accelerator.is_fp16_supported = lambda: True
accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]
pretrain.engine.engine.check_precision = lambda *_: None
"""
ALWAYS_NAN = """
real = pretrain.engine.engine.Engine.backward
pretrain.engine.engine.Engine.backward = lambda self, batch, loss_of, last: real(
    self, batch, lambda *a: loss_of(*a) * float("nan"), last=last
)
"""
SMALL_SCALE = "deepspeed.extra={fp16:{initial_scale_power:2,hysteresis:1}}"


@pytest.mark.parametrize("zero", ["0", "1", "3"])
def test_a_loss_scale_that_collapses_is_one_line(trainer: Trainer, corpus: Path, zero: str) -> None:
    options = (f"zero={zero}", "precision=fp16", "optim.max_skipped_steps=5", "steps=9", SMALL_SCALE)
    result = trainer.run(f"data.path={corpus}", *options, before=FP16 + ALWAYS_NAN)
    assert result.code == 70
    assert result.series("train/loss_scale") == [2, 1, 1, 1]
    assert "Traceback" not in result.stderr
    (line,) = result.errors
    assert "gradients were not finite for 5 steps in a row" in line


OVERFLOWING = """
from pretrain.engine.engine import Engine

steps, backward, step = 0, Engine.backward, Engine.step

def counted(self, lr):
    global steps
    steps += 1
    return step(self, lr)

def overflowing(self, batch, loss_of, last):
    factor = 1e30 if steps in (2, 3) else 1.0
    backward(self, batch, lambda *arguments: loss_of(*arguments) * factor, last=last)

Engine.step, Engine.backward = counted, overflowing
"""
HALVING = "deepspeed.extra={fp16:{initial_scale_power:8,hysteresis:1,loss_scale_window:4}}"


@pytest.mark.parametrize("zero", ["0", "1", pytest.param("2", marks=pytest.mark.slow), "3"])
def test_an_overflow_costs_its_step_and_halves_the_scale(trainer: Trainer, corpus: Path, zero: str) -> None:
    """Gradients beyond fp16 in the third step and the fourth. The scale doubles again after four steady steps, and what
    counts steps, samples and updates is right: the learning rate, the order of the samples, Adam's bias correction.
    """
    options = (f"zero={zero}", "precision=fp16", "steps=14", "optim.max_skipped_steps=3", HALVING)
    result = trainer.run(f"data.path={corpus}", *options, before=FP16 + OVERFLOWING)
    assert result.code == 0, result.stderr
    assert result.series("train/loss_scale") == [256, 256, 128, *[64] * 5, *[128] * 4, 256, 256]
    assert result.series("train/skipped_steps") == [0, 0, 1, 1, *[0] * 10]
    assert result.series("samples") == [16 * step for step in range(1, 15)]
    skipped = [json.loads(line) for line in (result.run / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["first_position"], row["end_position"]) for row in skipped] == [(2, 32, 48), (3, 48, 64)]
    state = json.loads((result.run / "checkpoints" / "step-00000014" / "state.json").read_text())
    assert (state["step"], state["samples"], state["optimizer_steps"]) == (14, 14 * 16, 12)
    assert state["loss_scale"] == {"value": 256.0, "steady_steps": 10, "hysteresis": 1}
    plain = Plain(corpus, "steps=14").train(14, skip=[2, 3])
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=5e-3)


GROWING = "deepspeed.extra={fp16:{initial_scale_power:2,hysteresis:2,loss_scale_window:4}}"


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["0", "1", "2", "3", "2_offload"])
def test_a_resumed_run_keeps_its_loss_scale(trainer: Trainer, corpus: Path, tmp_path: Path, zero: str) -> None:
    """The third step is skipped, and the scale doubles after four steady ones. Stops lie in between, at each stage
    alike: what the scaler has counted goes along.
    """
    options = (f"data.path={corpus}", f"zero={zero}", "precision=fp16", "steps=14", GROWING)
    whole = trainer.run(*options, ranks=2, before=FP16 + POISON)
    assert whole.codes == (0, 0), whole.stderrs
    assert whole.series("train/skipped_steps") == [0, 0, 1, *[0] * 11]
    assert whole.series("train/loss_scale") == [4] * 7 + [8] * 4 + [16] * 3
    for stop in (4, 6, 9, 14):
        before = FP16 + (POISON if stop == 4 else "")
        result = trainer.run(*options, f"runs_root={tmp_path}", f"stop_at={stop}", ranks=2, before=before)
        assert result.codes == ((0, 0) if stop == 14 else (75, 75)), result.stderrs
    for key in ("train/loss", "train/loss_scale", "train/grad_norm"):
        assert result.series(key) == whole.series(key), key


@pytest.mark.slow
def test_the_stages_agree(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """In fp16 and from stage to stage, on one rank and two; the scale goes on where it was."""
    options = (f"data.path={corpus}", "precision=fp16", "steps=10", "optim.lr=1e-4", GROWING)
    whole = trainer.run(*options, "zero=0", before=FP16)
    assert whole.code == 0, whole.stderr
    for stop, zero, ranks in ((3, 1, 2), (6, 0, 2), (8, 3, 1), (10, 2, 2)):
        result = trainer.run(
            *options, f"zero={zero}", f"runs_root={tmp_path}", f"stop_at={stop}", ranks=ranks, before=FP16
        )
        assert set(result.codes) == {0 if stop == 10 else 75}, result.stderrs
    assert result.series("train/loss_scale") == whole.series("train/loss_scale")
    assert result.series("train/loss") == pytest.approx(whole.series("train/loss"), abs=5e-3)
