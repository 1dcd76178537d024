"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2), right under ZeRO.

Each parameter's Adam update u is scaled by its trust ratio |w| / |u|, from norms of the *whole* parameter: added up
over its pieces and over ranks, in one all-reduce for all parameters.

As in the authors' code and in NVIDIA's (apex FusedLAMB): the ratio is not clamped, it is 1 where either norm is 0, and
parameters without weight decay (biases, LayerNorm) take the Adam update as it is. NVIDIA's division of all gradients by
their global norm, where that exceeds 1, is `optim.clip=1`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.sharded import Piece, ShardedOptimizer


class Lamb(ShardedOptimizer):
    """LAMB for groups that are `special`, AdamW for the others."""

    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Adam's updates, each parameter's multiplied by its trust ratio."""
        updates = self.adam_updates(tensors, group)
        numbers: list[int] = []
        weight_pieces: list[Tensor] = []
        update_pieces: list[Tensor] = []
        for number, (tensor, update) in enumerate(zip(tensors, updates, strict=True)):
            for piece in self._pieces.get(tensor, [Piece(number, 0, 0, tensor.numel())]):
                numbers.append(piece.parameter)
                weight_pieces.append(tensor.view(-1)[piece.offset : piece.offset + piece.length])
                update_pieces.append(update.view(-1)[piece.offset : piece.offset + piece.length])
        # In fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU.
        sums_2xP = tensors[0].new_zeros(2, len(self._shapes or tensors), dtype=torch.float64)
        index = _index(tuple(numbers), tensors[0].device)
        if numbers:  # none where a rank's share is all padding
            norms = torch._foreach_norm([*weight_pieces, *update_pieces], 2, dtype=torch.float64)
            sums_2xP.index_add_(1, index, torch.stack(norms).square().view(2, -1))
        self._add_over_ranks(sums_2xP)
        weight_norms_P, update_norms_P = sums_2xP.sqrt()
        defined_P = (weight_norms_P > 0) & (update_norms_P > 0)
        ratios_P = torch.where(defined_P, weight_norms_P / update_norms_P, 1.0).float()
        torch._foreach_mul_(update_pieces, list(ratios_P[index].unbind()))
        return updates


@lru_cache(maxsize=64)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` on the device; made once, since the copy waits for it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
