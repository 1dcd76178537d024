"""torch's AdamW, fused also on a CPU."""

import torch

from pretrain.optim.optimizer import ParameterGroups
from pretrain.optim.options.adamw import AdamwConfig


def build(config: AdamwConfig, groups: ParameterGroups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [groups.decayed, groups.no_decay],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
