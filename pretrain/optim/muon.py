"""Muon (Jordan et al. 2024) for the matrices of the encoder's layers, AdamW for the rest, under every ZeRO stage.

The momentum of a matrix, with Nesterov's look-ahead, is replaced by the nearest (semi-)orthogonal matrix, approximated
by five Newton-Schulz iterations, and scaled to the size of an Adam update: learning rate and weight decay are AdamW's
(Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2).

Under ZeRO the ranks put each matrix together with an all-reduce, all orthogonalize it, and each takes its partition.
DeepSpeed has a Muon of its own; its momentum lies otherwise at each stage, so a checkpoint could not cross stages.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.optimizer import ParameterGroups
from pretrain.optim.options.muon import MuonConfig
from pretrain.optim.sharded import Partition, ShardedOptimizer, gradients_of

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def build(config: MuonConfig, groups: ParameterGroups) -> "Muon":
    adam = {"special": False}
    return Muon(
        [groups.layers | {"momentum": config.momentum}, groups.others | adam, groups.no_decay | adam],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


class Muon(ShardedOptimizer):
    """Muon for groups that are `special` (with `momentum`, and `numbers`: their parameters), AdamW for the others."""

    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Orthogonalized momentum, scaled, and weight decay. Momentum in exp_avg; exp_avg_sq stays 0."""
        momenta = [self.state[tensor]["exp_avg"] for tensor in tensors]
        gradients = gradients_of(tensors)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        if self._partitions is None:
            for update in updates:
                update.copy_(orthogonal(update))
        else:
            self._orthogonalize_partitions(self._partitions, dict(zip(tensors, updates, strict=True)), group["numbers"])
        torch._foreach_add_(updates, tensors, alpha=group["weight_decay"])
        return updates

    def _orthogonalize_partitions(
        self, partitions: Mapping[int, Partition], updates: Mapping[Tensor, Tensor], numbers: Sequence[int]
    ) -> None:
        nothing = next(iter(updates.values()))[:0]
        for number in numbers:  # in one order on every rank
            partition = partitions.get(number)
            mine = partition.of(updates[partition.tensor]) if partition else nothing
            start = partition.start if partition else 0
            matrix = mine.new_zeros(self._shapes[number])
            matrix.view(-1)[start : start + len(mine)] = mine
            self._add_over_ranks(matrix)
            mine.copy_(orthogonal(matrix).reshape(-1)[start : start + len(mine)])


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition, times 0.2 sqrt(longer side); in bf16 on a GPU."""
    a, b, c = _COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.T if tall else x).to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape)))
    return result
