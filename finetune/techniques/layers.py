"""Layers that learn less than others, or nothing: rates that fall layer by layer, frozen layers."""

import re
from typing import Any

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
            lr = optim.lr * optim.layer_decay ** (num_layers + 1 - depth(name, num_layers))
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
