"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2), right under ZeRO.

Each parameter's Adam update u is scaled by its trust ratio |w| / |u|, from norms of the *whole* parameter. ZeRO hands
an optimizer flat tensors in which parameters lie side by side, cut where a rank's share ends. `shard` tells it which
piece belongs to which parameter; norms are added up over pieces and ranks, in one all-reduce for all parameters.

As in the authors' code and in NVIDIA's (apex FusedLAMB): the ratio is not clamped, it is 1 where either norm is 0, and
parameters without weight decay (biases, LayerNorm) take the Adam update as it is. NVIDIA's division of all gradients by
their global norm, where that exceeds 1, is `optim.clip=1`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A run of elements of a flat tensor that belong to one parameter."""

    parameter: int  # its number among all parameters, the same on every rank
    start: int
    length: int


class Lamb(torch.optim.Optimizer):
    """LAMB over groups with `lr`, `betas`, `eps`, `weight_decay`, `layer_adaptation` and `bias_correction`."""

    def __init__(self, params: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(params, {"layer_adaptation": True, "bias_correction": True, **defaults})
        self._pieces: Mapping[Tensor, list[Piece]] = {}
        self._num_parameters = 0
        self._add_over_ranks: Callable[[Tensor], None] = lambda _: None

    def shard(
        self, pieces: Mapping[Tensor, list[Piece]], num_parameters: int, add_over_ranks: Callable[[Tensor], None]
    ) -> None:
        """From now on tensors hold these pieces of parameters, and `add_over_ranks` sums a tensor in place.

        A tensor that is not among `pieces` is a whole parameter.
        """
        self._pieces, self._num_parameters, self._add_over_ranks = pieces, num_parameters, add_over_ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every tensor that has a gradient. Collective over what `add_over_ranks` spans."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                updates = self._adam_updates(tensors, group)
                if group["layer_adaptation"]:
                    self._scale(tensors, updates)
                torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    def _adam_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """m / (sqrt(v) + eps) + weight_decay * w, after m and v have taken in the gradients."""
        beta1, beta2 = group["betas"]
        for tensor in tensors:
            if not self.state[tensor]:
                zeros = torch.zeros_like(tensor), torch.zeros_like(tensor)
                self.state[tensor] = {"step": torch.zeros(()), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
            self.state[tensor]["step"] += 1
        steps = int(self.state[tensors[0]]["step"]) if group["bias_correction"] else math.inf
        first = [self.state[tensor]["exp_avg"] for tensor in tensors]
        second = [self.state[tensor]["exp_avg_sq"] for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - beta2)
        updates = torch._foreach_sqrt(second)
        torch._foreach_div_(updates, math.sqrt(1 - beta2**steps))
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        torch._foreach_div_(updates, 1 - beta1**steps)
        torch._foreach_add_(updates, tensors, alpha=group["weight_decay"])
        return list(updates)

    def _scale(self, tensors: list[Tensor], updates: list[Tensor]) -> None:
        """Multiply each parameter's update by its trust ratio."""
        numbers: list[int] = []
        weight_pieces: list[Tensor] = []
        update_pieces: list[Tensor] = []
        for number, (tensor, update) in enumerate(zip(tensors, updates, strict=True)):
            for parameter, start, length in self._pieces.get(tensor, [Piece(number, 0, tensor.numel())]):
                numbers.append(parameter)
                weight_pieces.append(tensor.view(-1)[start : start + length])
                update_pieces.append(update.view(-1)[start : start + length])
        # In fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU.
        sums_2xP = tensors[0].new_zeros(2, self._num_parameters or len(tensors), dtype=torch.float64)
        index = _index(tuple(numbers), tensors[0].device)
        if numbers:  # none where a rank's share is all padding
            norms = torch._foreach_norm([*weight_pieces, *update_pieces], 2, dtype=torch.float64)
            sums_2xP.index_add_(1, index, torch.stack(norms).square().view(2, -1))
        self._add_over_ranks(sums_2xP)
        weight_norms_P, update_norms_P = sums_2xP.sqrt()
        defined_P = (weight_norms_P > 0) & (update_norms_P > 0)
        ratios_P = torch.where(defined_P, weight_norms_P / update_norms_P, 1.0).float()
        torch._foreach_mul_(update_pieces, list(ratios_P[index].unbind()))


@lru_cache(maxsize=64)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` on the device; made once, since the copy waits for it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
