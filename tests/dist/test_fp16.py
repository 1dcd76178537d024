"""fp16 with a dynamic loss scale. DeepSpeed refuses it on CPUs, which can compute it: told so, it runs here."""

from pathlib import Path

import pytest

from tests.dist.test_stages import POISON
from tests.support import Trainer

FP16 = """
import torch
from deepspeed.accelerator import get_accelerator

import pretrain.engine

accelerator = get_accelerator()
accelerator.is_fp16_supported = lambda: True
accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]
pretrain.engine.check_precision = lambda *_: None
"""
ALWAYS_NAN = """
real = pretrain.engine.Engine.backward
pretrain.engine.Engine.backward = lambda self, batch, loss_of, last: real(
    self, batch, lambda *a: loss_of(*a) * float("nan"), last=last
)
"""
SMALL_SCALE = "deepspeed.extra={fp16:{initial_scale_power:2,hysteresis:1}}"


@pytest.mark.parametrize("zero", ["1", "3"])
def test_a_loss_scale_that_collapses_is_one_line(trainer: Trainer, corpus: Path, zero: str) -> None:
    options = (f"zero={zero}", "precision=fp16", "optim.max_skipped_steps=5", "steps=9", SMALL_SCALE)
    result = trainer.run(f"data.path={corpus}", *options, before=FP16 + ALWAYS_NAN)
    assert result.code == 70
    assert result.series("train/loss_scale") == [2, 1, 1, 1]
    assert "Traceback" not in result.stderr
    (line,) = result.errors
    assert "gradients were not finite for 5 steps in a row" in line


def test_a_resumed_run_keeps_its_loss_scale(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """The third step is skipped and halves the scale; the run that resumes after it goes on as the whole one."""
    options = (f"data.path={corpus}", "zero=2", "precision=fp16", SMALL_SCALE)
    whole = trainer.run(*options, ranks=2, before=FP16 + POISON)
    assert whole.codes == (0, 0), whole.stderrs
    assert whole.series("train/loss_scale") == [4, 4, 2, 2, 2, 2]
    stopped = trainer.run(*options, f"runs_root={tmp_path}", "stop_at=4", ranks=2, before=FP16 + POISON)
    assert stopped.codes == (75, 75), stopped.stderrs
    resumed = trainer.run(*options, f"runs_root={tmp_path}", ranks=2, before=FP16)
    assert resumed.codes == (0, 0), resumed.stderrs
    for key in ("train/loss", "train/loss_scale", "train/grad_norm"):
        assert resumed.series(key) == whole.series(key), key
