"""Layers that learn less than others, later, or from nothing: rates by layer, frozen layers, new random weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cloze.errors import UserError
from finetune.keys import OptimConfig


def depth(name: str, num_layers: int) -> int:
    """0 for a parameter of the embeddings, i + 1 for one of layer i, num_layers + 1 for what stands above."""
    if match := re.search(r"\blayers?\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if "embeddings." in name else num_layers + 1


def parameter_groups(model: nn.Module, optim: OptimConfig, num_layers: int) -> list[dict[str, Any]]:
    """Groups for AdamW: the learning rate falls by `layer_decay` per layer (Howard and Ruder 2018, section 3.2)."""
    assert optim.lr is not None, "`rates.settled` sets it"
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            below = num_layers + 1 - depth(name, num_layers)
            lr = optim.lr * optim.layer_decay**below if below else optim.head_lr or optim.lr
            lr = optim.crf_lr if re.search(r"\bcrf\.", name) else lr
            groups.setdefault((lr, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": optim.weight_decay if decays else 0.0}
        for (lr, decays), parameters in groups.items()
    ]


def freeze(model: nn.Module, num_frozen: int, num_layers: int) -> None:
    """The embeddings and the lowest `num_frozen` layers keep their weights."""
    if num_frozen > num_layers:
        raise UserError(f"freeze_layers={num_frozen}: the model has {num_layers} layers")
    for name, parameter in model.named_parameters():
        if depth(name, num_layers) <= num_frozen:
            parameter.requires_grad = False


@contextmanager
def head_alone(model: nn.Module, num_layers: int) -> Iterator[None]:
    """Within it only what stands above the layers learns: linear probing before fine-tuning (Kumar et al. 2022)."""
    held = [
        one for name, one in model.named_parameters() if one.requires_grad and depth(name, num_layers) <= num_layers
    ]
    for parameter in held:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad = True


@torch.no_grad()
def reinitialize(model: Any, count: int, num_layers: int) -> None:
    """New random weights for the pooler and the `count` highest layers (Zhang et al. 2021, section 4)."""
    if count > num_layers:
        raise UserError(f"reinit_layers={count}: the model has {num_layers} layers")
    encoder = model.base_model
    anew = type(encoder)(encoder.config).state_dict()
    for name, value in encoder.state_dict().items():
        if depth(name, num_layers) > num_layers - count and name in anew:
            value.copy_(anew[name])
