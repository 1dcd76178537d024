"""Parameter groups and the optimizer object that the engine shards. Knows nothing of DeepSpeed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig, OptimizerKind
from pretrain.lamb import Lamb


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight matrices with decay; biases and LayerNorm without (as in google-research/bert)."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        (no_decay if parameter.ndim < 2 or "LayerNorm" in name else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused also on a CPU, or LAMB, both with decoupled weight decay."""
    groups = parameter_groups(named_parameters, config.weight_decay)
    shared: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(groups, fused=True, **shared)
    decay, no_decay = groups
    return Lamb([decay, no_decay | {"layer_adaptation": False}], bias_correction=config.bias_correction, **shared)
