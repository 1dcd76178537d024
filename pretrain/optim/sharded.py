"""What an optimizer needs to see whole parameters under ZeRO, and the Adam update that those here start from.

ZeRO hands an optimizer flat tensors in which partitions of parameters lie side by side; `register_partitions` tells it
which belongs to which parameter. Moments lie as the tensors do, under Adam's names: checkpoints need not know.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """A rank's part of one parameter: where it lies in a tensor that the optimizer updates."""

    tensor: Tensor  # the parameter itself where it is whole, else flat, with others beside it
    offset: int  # first element there
    start: int  # first element in the flattened parameter
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of `tensor`, which lies as the partition's own (a moment, an update), as a flat view."""
        return tensor.view(-1)[self.offset : self.offset + self.length]


class ShardedOptimizer(torch.optim.Optimizer, ABC):
    """Groups hold `lr`, `betas`, `eps`, `weight_decay` and `bias_correction`; those without `special` get AdamW."""

    def __init__(self, params: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(params, {"special": True, "bias_correction": True, **defaults})
        self._partitions: Mapping[int, Partition] | None = None
        self._shapes: Sequence[torch.Size] = ()
        self._add_over_ranks: Callable[[Tensor], None] = lambda _: None

    def register_partitions(
        self,
        partitions: Mapping[int, Partition],
        shapes: Sequence[torch.Size],
        add_over_ranks: Callable[[Tensor], None],
    ) -> None:
        """From now on tensors hold `partitions` of parameters, by number, and `add_over_ranks` sums a tensor in place.

        `shapes` are those of all parameters. Until then each tensor is a whole parameter.
        """
        self._partitions, self._shapes, self._add_over_ranks = partitions, shapes, add_over_ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every tensor that has a gradient. Collective over what `add_over_ranks` spans."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                for tensor in tensors:
                    if not self.state[tensor]:
                        zeros = torch.zeros_like(tensor), torch.zeros_like(tensor)
                        self.state[tensor] = {"step": torch.zeros(()), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
                    self.state[tensor]["step"] += 1
                updates = (self.special_updates if group["special"] else self.adam_updates)(tensors, group)
                torch._foreach_add_(tensors, updates, alpha=-group["lr"])

    @abstractmethod
    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """What a learning rate of 1 takes away from the tensors of a group."""

    def adam_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """m / (sqrt(v) + eps) + weight_decay * w, after m and v have taken in the gradients."""
        beta1, beta2 = group["betas"]
        steps = int(self.state[tensors[0]]["step"]) if group["bias_correction"] else math.inf
        first = [self.state[tensor]["exp_avg"] for tensor in tensors]
        second = [self.state[tensor]["exp_avg_sq"] for tensor in tensors]
        gradients = gradients_of(tensors)
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

    def parts_in(self, tensors: Sequence[Tensor]) -> dict[int, Partition]:
        """The partitions that lie in these tensors, by the number of their parameter; none where all is padding."""
        if self._partitions is None:
            return {place: Partition(tensor, 0, 0, tensor.numel()) for place, tensor in enumerate(tensors)}
        own = set(tensors)
        return {number: part for number, part in self._partitions.items() if part.tensor in own}

    def sizes(self, parts: Mapping[int, Partition]) -> list[int]:
        """Elements of the whole parameters of `parts`."""
        return [self._shapes[number].numel() if self._shapes else part.length for number, part in parts.items()]

    def whole_norms(
        self, parts: Mapping[int, Partition], kinds: Sequence[Sequence[Tensor]], device: torch.device
    ) -> Tensor:
        """2-norms over whole parameters, f64 [kinds, parts], from the values that lie here, of each kind one per part.

        Collective: one all-reduce.
        """
        numbers = tuple(parts)
        index = _index(numbers, device)
        # In fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU.
        sums_KxP = torch.zeros(len(kinds), len(self._shapes or numbers), dtype=torch.float64, device=device)
        if numbers:
            norms = torch._foreach_norm([value for kind in kinds for value in kind], 2, dtype=torch.float64)
            sums_KxP.index_add_(1, index, torch.stack(norms).square().view(len(kinds), -1))
        self._add_over_ranks(sums_KxP)
        return sums_KxP.sqrt()[:, index]


@lru_cache(maxsize=64)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """`numbers` on the device; made once, since the copy waits for it."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def gradients_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]
