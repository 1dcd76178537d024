"""StableAdamW under ZeRO against its algorithm written out slowly, one whole parameter at a time, in fp64."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.optim.options.stable_adamw import StableAdamwConfig
from tests.dist.test_stages import Plain
from tests.support import Trainer

STEPS = 8
STABLE = ("optim=stable_adamw", "optim.lr=0.01", "optim.weight_decay=0.1", "model.num_layers=1", f"steps={STEPS}")


class SlowStableAdamw:
    """Wortsman et al. 2023, algorithm 2, with its bias corrections in the betas."""

    def __init__(self, model: nn.Module, config: StableAdamwConfig) -> None:
        self.config, self.steps = config, 0
        self.named = list(model.named_parameters())
        self.moments = {name: (torch.zeros_like(p).double(), torch.zeros_like(p).double()) for name, p in self.named}
        self.param_groups = [{"lr": 0.0}]
        self.clipped = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        betas = [
            beta * (1 - beta ** (self.steps - 1)) / (1 - beta**self.steps)
            for beta in (self.config.beta1, self.config.beta2)
        ]
        for name, parameter in self.named:
            w, g = parameter.double(), parameter.grad.double()
            v, u = self.moments[name]
            v, u = betas[0] * v + (1 - betas[0]) * g, betas[1] * u + (1 - betas[1]) * g * g
            self.moments[name] = (v, u)
            rms = math.sqrt(float((g * g / u.clamp(min=self.config.eps**2)).mean()))
            self.clipped += rms > 1.01
            rate = self.param_groups[0]["lr"] / max(1.0, rms)
            decay = 0.0 if name.endswith(".bias") or ".LayerNorm." in name else self.config.weight_decay
            parameter.copy_(w - rate * decay * w - rate * v / (u.sqrt() + self.config.eps))

    def zero_grad(self) -> None:
        for _, parameter in self.named:
            parameter.grad = None


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Plain:
    result = Plain(corpus, *STABLE)
    result.optimizer = SlowStableAdamw(result.model, result.config.optim)
    result.train(STEPS)
    assert result.optimizer.clipped > STEPS  # else this were AdamW
    return result


@pytest.mark.parametrize(("zero", "ranks"), [("0", 1), ("1", 2), ("2", 2), ("3", 2), ("3_offload", 1)])
def test_equals_the_unsharded_algorithm(trainer: Trainer, corpus: Path, plain: Plain, zero: str, ranks: int) -> None:
    """Biases of keys apart: their gradients are rounding, of which Adam makes steps."""
    result = trainer.run(f"data.path={corpus}", f"zero={zero}", *STABLE, ranks=ranks)
    assert set(result.codes) == {0}, result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=2e-5)
    weights = load_file(result.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, parameter in plain.model.hf.named_parameters():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=0)
