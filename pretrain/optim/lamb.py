"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2), right under ZeRO.

Each parameter's Adam update u is scaled by its trust ratio |w| / |u|, from norms of the *whole* parameter: added up
over its partitions and over ranks, in one all-reduce for all parameters.

As in the authors' code and in NVIDIA's (apex FusedLAMB): the ratio is not clamped, it is 1 where either norm is 0, and
parameters without weight decay (biases, LayerNorm) take the Adam update as it is. NVIDIA's division of all gradients by
their global norm, where that exceeds 1, is `optim.clip=1`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.optimizer import ParameterGroups
from pretrain.optim.options.lamb import LambConfig
from pretrain.optim.sharded import ShardedOptimizer


def build(config: LambConfig, groups: ParameterGroups) -> "Lamb":
    return Lamb(
        [groups.decayed, groups.no_decay | {"special": False}],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        bias_correction=config.bias_correction,
    )


class Lamb(ShardedOptimizer):
    """LAMB for groups that are `special`, AdamW for the others."""

    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Adam's updates, each parameter's multiplied by its trust ratio."""
        updates = self.adam_updates(tensors, group)
        places, parts = {tensor: place for place, tensor in enumerate(tensors)}, self.parts_in(tensors)
        weight_parts = [part.of(part.tensor) for part in parts.values()]
        update_parts = [part.of(updates[places[part.tensor]]) for part in parts.values()]
        weight_norms_P, update_norms_P = self.whole_norms(parts, (weight_parts, update_parts), tensors[0].device)
        defined_P = (weight_norms_P > 0) & (update_norms_P > 0)
        ratios_P = torch.where(defined_P, weight_norms_P / update_norms_P, 1.0).float()
        if parts:
            torch._foreach_mul_(update_parts, list(ratios_P.unbind()))
        return updates
