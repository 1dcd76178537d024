"""plan's bytes of weights, gradients and optimizer against those of real runs on two ranks."""

import json
from pathlib import Path

import pytest

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.plan import Shape, memory
from tests.support import TINY, Trainer

# Counts what rank 0 holds: gradients right before an update, the rest after it.
COUNT = """
import json
from pretrain.engine.engine import Engine

def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def step(self, lr, update=Engine.step):
    parameters = list(self._deepspeed.module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    if self.stage:
        gradients += [g for group in self._deepspeed.optimizer.averaged_gradients.values() for g in group or []]
    held = {"count": self.num_parameters, "gradients": size(gradients)}
    result = update(self, lr)
    held["weights"] = size(p.ds_tensor if self.stage == 3 else p for p in parameters)
    held["moments"] = size(s[kind] for s in self._inner.state.values() for kind in ("exp_avg", "exp_avg_sq"))
    print(json.dumps(held), flush=True)
    return result

Engine.step = step
"""


@pytest.mark.parametrize(
    ("zero", "precision", "micro"),
    [
        ("0", "fp32", 4), ("1", "bf16", 4), ("1", "bf16", 8), ("2", "fp32", 4), ("2", "bf16", 4), ("3", "bf16", 4),
        pytest.param("3", "bf16", 8, marks=pytest.mark.slow), ("2_offload", "bf16", 4),
        pytest.param("2_offload", "bf16", 8, marks=pytest.mark.slow), ("3_offload", "bf16", 4),
    ],
)  # fmt: skip
def test_state_takes_the_bytes_that_plan_says(
    trainer: Trainer, corpus: Path, zero: str, precision: str, micro: int
) -> None:
    """With two micro-batches of 4 a step, or one of 8. What is offloaded is on no GPU; here it is all on the CPU."""
    overrides = (f"data.path={corpus}", f"zero={zero}", f"precision={precision}", f"micro_batch_size={micro}")
    result = trainer.run(*overrides, "steps=1", ranks=2, before=COUNT)
    assert result.codes == (0, 0), result.stderrs
    held = json.loads((result.run.parent / "stdout-0").read_text().splitlines()[0])
    config = cli.compose("train", TrainConfig, [*TINY, "run=r", *overrides])
    said, size = memory(config, held["count"], 2, Shape(1, 1, 1, 1, 64)), 4 if precision == "fp32" else 2
    summed = 4 if micro == 4 else size

    gathered = size * held["count"] if zero[0] == "3" else 0  # stage 3: during a pass only
    not_yet_reduced = summed * held["count"] if zero == "1" else 0  # stage 1: before the last micro-batch ends
    in_update = 0 if zero == "0" or (zero[0] < "3" and summed > size) else 2 * held["count"]  # copied in fp32
    masters = held["moments"] // 2 if zero != "0" else 0
    padding = 64
    assert held["weights"] == pytest.approx(said.weights - gathered, abs=padding)
    assert held["gradients"] == pytest.approx(said.gradients - not_yet_reduced, abs=padding)
    if zero.endswith("offload"):
        assert said.optimizer == 0
    else:
        assert held["moments"] + masters == pytest.approx(said.optimizer - in_update, abs=padding)
