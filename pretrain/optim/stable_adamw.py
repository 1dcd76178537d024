"""StableAdamW (Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models").

AdamW in which each parameter's update, weight decay included, is divided by the root mean square of g / sqrt(v) where
that exceeds 1: there the second moment v lags behind the gradient g, and the update would be too large (their algorithm
2, after Adafactor's update clipping). The mean is over the *whole* parameter, and v is corrected for its bias.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.optim.optimizer import ParameterGroups
from pretrain.optim.options.stable_adamw import StableAdamwConfig
from pretrain.optim.sharded import ShardedOptimizer, gradients_of


def build(config: StableAdamwConfig, groups: ParameterGroups) -> "StableAdamw":
    return StableAdamw(
        [groups.decayed, groups.no_decay],
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


class StableAdamw(ShardedOptimizer):
    """StableAdamW for every group."""

    def special_updates(self, tensors: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """AdamW's updates, each parameter's divided by max(1, RMS(g / max(sqrt(v), eps)))."""
        updates = self.adam_updates(tensors, group)
        steps = int(self.state[tensors[0]]["step"])
        roots = torch._foreach_sqrt([self.state[tensor]["exp_avg_sq"] for tensor in tensors])
        torch._foreach_div_(roots, math.sqrt(1 - group["betas"][1] ** steps))
        torch._foreach_clamp_min_(roots, group["eps"])
        ratios = torch._foreach_div(gradients_of(tensors), roots)
        places, parts = {tensor: place for place, tensor in enumerate(tensors)}, self.parts_in(tensors)
        ratio_parts = [part.of(ratios[places[part.tensor]]) for part in parts.values()]
        update_parts = [part.of(updates[places[part.tensor]]) for part in parts.values()]
        if parts:  # so that norms are root mean squares
            torch._foreach_div_(ratio_parts, [math.sqrt(size) for size in self.sizes(parts)])
        (rms_P,) = self.whole_norms(parts, (ratio_parts,), tensors[0].device)
        if parts:
            torch._foreach_div_(update_parts, list(rms_P.clamp(min=1.0).float().unbind()))
        return updates
