"""Muon under ZeRO against its algorithm written out slowly, one whole matrix at a time, in fp64."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain.optim.muon import orthogonal
from pretrain.optim.options.muon import MuonConfig
from tests.dist.test_stages import Plain
from tests.support import Trainer

STEPS = 10
MUON = ("optim=muon", "optim.lr=0.01", "optim.weight_decay=0.1", f"steps={STEPS}")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_singular_values_come_near_one(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ vt.T / (0.2 * max(rows, columns) ** 0.5)
    values = found.diagonal()
    torch.testing.assert_close(found, torch.diag(values), atol=1e-9, rtol=0)  # the same singular vectors
    large = values[s > 0.02 * matrix.norm()]
    assert ((large > 0.5) & (large < 1.35)).all()


def slow_orthogonal(matrix: Tensor) -> Tensor:
    """The same quintic on singular values, from an SVD: nothing of Newton-Schulz's matrix products."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (matrix.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


class SlowMuon:
    """Matrices of layers by Muon, scaled as Liu et al. 2025, section 2.2; the rest by torch's AdamW."""

    def __init__(self, model: nn.Module, config: MuonConfig) -> None:
        self.config, named = config, list(model.named_parameters())
        self.matrices = {n: p for n, p in named if ".encoder.layer." in n and n.endswith(".weight") and "Norm" not in n}
        rest = [(n, p) for n, p in named if n not in self.matrices]
        spared = [p for n, p in rest if n.endswith(".bias") or "LayerNorm" in n]
        others = [p for n, p in rest if not (n.endswith(".bias") or "LayerNorm" in n)]
        groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
        self.param_groups = self.adam.param_groups
        self.momenta = {name: torch.zeros_like(p).double() for name, p in self.matrices.items()}

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        beta, rate = self.config.momentum, self.param_groups[0]["lr"]
        for name, parameter in self.matrices.items():
            gradient = parameter.grad.double()
            self.momenta[name] = beta * self.momenta[name] + (1 - beta) * gradient
            update = slow_orthogonal((1 - beta) * gradient + beta * self.momenta[name])
            scale = 0.2 * max(parameter.shape) ** 0.5
            parameter.copy_(parameter.double() * (1 - rate * self.config.weight_decay) - rate * scale * update)

    def zero_grad(self) -> None:
        self.adam.zero_grad()
        for parameter in self.matrices.values():
            parameter.grad = None


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Plain:
    result = Plain(corpus, *MUON)
    result.optimizer = SlowMuon(result.model, result.config.optim)
    return result.train(STEPS)


@pytest.mark.parametrize(("zero", "ranks"), [("0", 2), ("1", 2), ("2_offload", 1), ("3", 2)])
def test_equals_the_unsharded_algorithm(trainer: Trainer, corpus: Path, plain: Plain, zero: str, ranks: int) -> None:
    result = trainer.run(f"data.path={corpus}", f"zero={zero}", *MUON, ranks=ranks)
    assert set(result.codes) == {0}, result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=2e-5)
    weights = load_file(result.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, parameter in plain.model.hf.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-4, rtol=0)


def test_checkpoints_cross_stages(trainer: Trainer, corpus: Path, plain: Plain, tmp_path: Path) -> None:
    for stop, zero, ranks in ((3, "2", 2), (6, "3_offload", 1), (STEPS, "0", 2)):
        layout = (f"runs_root={tmp_path}", f"zero={zero}", f"stop_at={stop}")
        result = trainer.run(f"data.path={corpus}", *MUON, *layout, ranks=ranks)
        assert set(result.codes) == {0 if stop == STEPS else 75}, result.stderrs
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=2e-5)
