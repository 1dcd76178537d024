"""Half a cosine (Loshchilov and Hutter 2017)."""

import math
from dataclasses import dataclass

from pretrain.optim.schedules.base import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class CosineConfig(ScheduleConfig, kind="cosine"):
    def height(self, left: float) -> float:
        return (1.0 - math.cos(math.pi * self.share_left(left))) / 2.0
