"""LAMB under every ZeRO stage against its algorithm written out slowly, one whole parameter at a time, in fp64."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.optim.options.lamb import LambConfig
from tests.dist.test_stages import POISON, Plain
from tests.support import Trainer

STEPS = 50
LAMB = ("optim=lamb", "optim.lr=0.05", "model.num_layers=1")
LONG = (f"steps={STEPS}", "micro_batch_size=8")


class SlowLamb:
    """You et al. 2020, algorithm 2; phi is the identity; biases and LayerNorm neither decay nor adapt."""

    def __init__(self, model: nn.Module, config: LambConfig) -> None:
        self.config, self.steps = config, 0
        self.named = list(model.named_parameters())
        self.moments = {name: (torch.zeros_like(p).double(), torch.zeros_like(p).double()) for name, p in self.named}
        self.param_groups = [{"lr": 0.0}]

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, parameter in self.named:
            w, g = parameter.double(), parameter.grad.double()
            m, v = self.moments[name]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            self.moments[name] = (m, v)
            m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
            update, ratio = m_hat / (v_hat.sqrt() + self.config.eps), 1.0
            if not (name.endswith(".bias") or ".LayerNorm." in name):
                update = update + self.config.weight_decay * w
                norm, update_norm = math.sqrt(float((w * w).sum())), math.sqrt(float((update * update).sum()))
                ratio = norm / update_norm if norm and update_norm else 1.0
            parameter.copy_(w - self.param_groups[0]["lr"] * ratio * update)

    def zero_grad(self) -> None:
        for _, parameter in self.named:
            parameter.grad = None


def plain_lamb(corpus: Path, *overrides: str) -> Plain:
    plain = Plain(corpus, *overrides)
    plain.optimizer = SlowLamb(plain.model, plain.config.optim)
    return plain


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Plain:
    return plain_lamb(corpus, *LAMB, *LONG).train(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "ranks"), [("0", 2), ("1", 1), ("1", 2), ("2", 2), ("2_offload", 2), ("3", 2), ("3_offload", 2)]
)
def test_fifty_steps_equal_the_unsharded_algorithm(
    trainer: Trainer, corpus: Path, plain: Plain, zero: str, ranks: int
) -> None:
    """Weights move by up to 0.6 and end within 1e-6 of each other.

    Biases of keys apart: softmax does not see them, so their gradients are rounding, of which Adam makes steps.
    """
    result = trainer.run(f"data.path={corpus}", f"zero={zero}", *LAMB, *LONG, ranks=ranks)
    assert set(result.codes) == {0}, result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=2e-6)
    weights = load_file(result.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, parameter in plain.model.hf.named_parameters():
        atol = 2e-6 if name.endswith("key.bias") else 1e-6
        torch.testing.assert_close(weights[name], parameter.detach(), atol=atol, rtol=0)


@pytest.mark.slow
def test_checkpoints_cross_stages(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    legs = ((2, "1", 2), (3, "3_offload", 1), (4, "0", 2), (6, "3", 2))
    for stop, zero, ranks in legs:
        layout = (f"runs_root={tmp_path}", f"zero={zero}", f"stop_at={stop}")
        result = trainer.run(f"data.path={corpus}", *LAMB, *layout, ranks=ranks)
        assert set(result.codes) == {0 if stop == 6 else 75}, result.stderrs
    assert result.series("train/loss") == pytest.approx(plain_lamb(corpus, *LAMB).train(6).losses, abs=1e-5)


def test_a_bad_gradient_costs_that_step_alone(trainer: Trainer, corpus: Path) -> None:
    result = trainer.run(f"data.path={corpus}", "zero=2", *LAMB, ranks=2, before=POISON)
    assert result.codes == (0, 0), result.stderrs
    assert result.series("train/skipped_steps") == [0, 0, 1, 0, 0, 0]
    expected = plain_lamb(corpus, *LAMB).train(6, skip=[2]).losses
    assert result.series("train/loss") == pytest.approx(expected, abs=1e-5)
