"""Parameter groups and the optimizer object that the engine shards. Knows nothing of DeepSpeed."""

import importlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from pretrain.optim.options import OptimConfig

_IN_A_LAYER = re.compile(r"\.layers?\.[0-9]+\.")


class ParameterGroups(NamedTuple):
    """Groups as torch's optimizers take them; `numbers` of one counts its parameters among all."""

    layers: dict[str, Any]  # weight matrices of the encoder's layers
    others: dict[str, Any]  # of embeddings and heads
    no_decay: dict[str, Any]  # biases and LayerNorm

    @property
    def decayed(self) -> dict[str, Any]:
        """`layers` and `others` as one group."""
        params = [*self.layers["params"], *self.others["params"]]
        return {"params": params, "weight_decay": self.layers["weight_decay"]}


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> ParameterGroups:
    """Weight matrices with decay; biases and LayerNorm without (as in google-research/bert)."""
    decays = (weight_decay, weight_decay, 0.0)
    groups = ParameterGroups(*({"params": [], "numbers": [], "weight_decay": decay} for decay in decays))
    for number, (name, parameter) in enumerate(named_parameters):
        group = groups.no_decay if parameter.ndim < 2 else groups.layers if _IN_A_LAYER.search(name) else groups.others
        group["params"].append(parameter)
        group["numbers"].append(number)
    return groups


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """What `build` of the module of this kind makes."""
    module = importlib.import_module(f"pretrain.optim.{config.kind}")
    optimizer: torch.optim.Optimizer = module.build(config, parameter_groups(named_parameters, config.weight_decay))
    return optimizer
