"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2), right under ZeRO.

Each parameter's Adam update u is scaled by its trust ratio |w| / |u|, from norms of the *whole* parameter: added up
over its partitions and over ranks, in one all-reduce for all parameters.

As in the authors' code and in NVIDIA's (apex FusedLAMB): the ratio is not clamped, it is 1 where either norm is 0, and
parameters without weight decay (biases, LayerNorm) take the Adam update as it is. NVIDIA's division of all gradients by
their global norm, where that exceeds 1, is `optim.clip=1`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.optimizer import ParameterGroups
from pretrain.optim.options.lamb import LambConfig
from pretrain.optim.sharded import Partition, ShardedOptimizer


def build(config: LambConfig, groups: ParameterGroups) -> "Lamb":
    return Lamb(
        [groups.decayed, groups.no_decay | {"special": False}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        bias_correction=config.bias_correction,
    )


class Lamb(ShardedOptimizer):
    """LAMB for groups that are `special`, AdamW for the others."""

    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Adam's updates, each parameter's multiplied by its trust ratio."""
        updates = self.adam_updates(tensors, group)
        places = {tensor: place for place, tensor in enumerate(tensors)}
        if self._partitions is None:
            held = {place: Partition(tensor, 0, 0, tensor.numel()) for tensor, place in places.items()}
        else:
            held = {number: part for number, part in self._partitions.items() if part.tensor in places}
        weight_parts = [part.of(part.tensor) for part in held.values()]
        update_parts = [part.of(updates[places[part.tensor]]) for part in held.values()]
        # In fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU.
        sums_2xP = tensors[0].new_zeros(2, len(self._shapes or tensors), dtype=torch.float64)
        index = _index(tuple(held), tensors[0].device)
        if held:  # nothing where all that a rank has is padding
            norms = torch._foreach_norm([*weight_parts, *update_parts], 2, dtype=torch.float64)
            sums_2xP.index_add_(1, index, torch.stack(norms).square().view(2, -1))
        self._add_over_ranks(sums_2xP)
        weight_norms_P, update_norms_P = sums_2xP.sqrt()
        defined_P = (weight_norms_P > 0) & (update_norms_P > 0)
        ratios_P = torch.where(defined_P, weight_norms_P / update_norms_P, 1.0).float()
        if held:
            torch._foreach_mul_(update_parts, list(ratios_P[index].unbind()))
        return updates


@lru_cache(maxsize=64)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` on the device; made once, since the copy waits for it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
