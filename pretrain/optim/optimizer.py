"""Parameter groups and the optimizer object that the engine shards. Knows nothing of DeepSpeed."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig, OptimizerKind
from pretrain.optim.lamb import Lamb
from pretrain.optim.muon import Muon

_IN_A_LAYER = re.compile(r"\.layers?\.[0-9]+\.")


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices with decay, those of layers first; biases and LayerNorm without (as in google-research/bert).

    `numbers` of a group counts its parameters among all of them.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "numbers": [], "weight_decay": decay} for decay in (weight_decay, weight_decay, 0.0)
    ]
    for number, (name, parameter) in enumerate(named_parameters):
        group = groups[2 if parameter.ndim < 2 else 0 if _IN_A_LAYER.search(name) else 1]
        group["params"].append(parameter)
        group["numbers"].append(number)
    return groups


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused also on a CPU, LAMB or Muon, all with decoupled weight decay."""
    layers, others, spared = parameter_groups(named_parameters, config.weight_decay)
    decayed = {"params": layers["params"] + others["params"], "weight_decay": config.weight_decay}
    shared: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    match config.kind:
        case OptimizerKind.adamw:
            return torch.optim.AdamW([decayed, spared], fused=True, **shared)
        case OptimizerKind.lamb:
            return Lamb([decayed, spared | {"special": False}], bias_correction=config.bias_correction, **shared)
        case OptimizerKind.muon:
            adam = {"special": False}
            return Muon([layers | {"momentum": config.momentum}, others | adam, spared | adam], **shared)
