"""Dropout on a CPU: 16 random bits an element, where torch draws a number for each, at six times the cost.

Shapes: any.
"""

from typing import Any

import torch
from torch import Tensor, nn

_LEVELS = 2**16  # a probability of 0.1 is 0.100006


class Dropout(nn.Dropout):
    """Zeros elements with probability `p` in training, and scales the rest so that means stay (Srivastava et al. 2014).

    Draws from torch's own generator: `torch.manual_seed` decides.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p:
            return input
        out: Tensor = _Dropout.apply(input, round(self.p * _LEVELS))  # type: ignore[no-untyped-call]
        return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        count = x.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        factors = torch.ge(bits[:count].view(x.shape), threshold - _LEVELS // 2, out=torch.empty_like(x))
        factors.mul_(_LEVELS / (_LEVELS - threshold))
        ctx.save_for_backward(factors)
        return x * factors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return grads[0] * factors, None


def replace_dropout(module: nn.Module) -> None:
    """Let every `nn.Dropout` in `module` be one of these."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
