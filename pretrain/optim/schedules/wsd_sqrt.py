"""Warm-up, stable, decay with an end that falls as 1 - sqrt: steeply at first, then ever more slowly.

The form of the cooldown that Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", found better than a straight one.
"""

import math
from dataclasses import dataclass

from pretrain.optim.schedules.wsd import WsdConfig


@dataclass(frozen=True, kw_only=True)
class WsdSqrtConfig(WsdConfig, kind="wsd_sqrt"):
    def height(self, left: float) -> float:
        return 1.0 - math.sqrt(1.0 - super().height(left))
