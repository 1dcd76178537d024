"""A power of the share of the decay that is left, as in NVIDIA's LAMB recipe."""

import math
from dataclasses import dataclass

from cloze.schema import doc, require
from pretrain.optim.schedules.base import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class PolynomialConfig(ScheduleConfig, kind="polynomial"):
    power: float = doc("exponent of the share of the decay that is left; 1 is linear, below it falls late")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.power < math.inf, f"schedule.power={self.power}: must be positive")

    def height(self, left: float) -> float:
        height: float = self.share_left(left) ** self.power
        return height
