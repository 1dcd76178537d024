"""Clipping at stage 0 against gradients that were scaled by hand, whoever scales them: engine or optimizer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.engine.engine import _StageZeroGuard
from pretrain.optim.optimizer import build_optimizer

CLIP = 0.5
SHAPES = {"hf.bert.encoder.layer.0.weight": (4, 6), "hf.embeddings.weight": (50, 6), "hf.bias": (6,)}


def steps(kind: str, clip: float, gradients: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Any]]:
    """(weights after the steps, what the guard found of each)."""
    optim = replace(cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"optim={kind}"]).optim, clip=clip)
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(parameters.items(), optim)
    guard, found = _StageZeroGuard(optimizer, optim, None), []
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for given in gradients:
        for parameter, gradient in zip(parameters.values(), given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        found.append((guard.applied, guard.grad_norm))
    return [parameter.detach() for parameter in parameters.values()], found


@pytest.mark.parametrize("kind", ["adamw", "stable_adamw", "lamb", "muon"])
def test_a_clipped_step_is_one_with_smaller_gradients(kind: str) -> None:
    """Too long, short enough, not finite (skipped), too long."""
    torch.manual_seed(1)
    given = [[torch.randn(shape) * size for shape in SHAPES.values()] for size in (1.0, 1e-3, torch.nan, 3.0)]
    norms = [float(torch.cat([gradient.double().flatten() for gradient in one]).norm()) for one in given]
    assert norms[0] > CLIP > norms[1]
    factors = [min(1.0, CLIP / norm) for norm in norms]
    by_hand = [[gradient * factor for gradient in one] for one, factor in zip(given, factors, strict=True)]

    ours, found = steps(kind, CLIP, given)
    expected, _ = steps(kind, 0.0, by_hand)
    unclipped, _ = steps(kind, 0.0, given)
    assert [applied for applied, _ in found] == [True, True, False, True]
    assert [norm for _, norm in found] == pytest.approx(norms, rel=1e-6, nan_ok=True)
    for mine, right, wrong in zip(ours, expected, unclipped, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(mine, wrong, rtol=1e-6, atol=1e-6)
