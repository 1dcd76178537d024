"""Linear decay (Devlin et al. 2019)."""

from dataclasses import dataclass

from pretrain.optim.schedules.base import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ScheduleConfig, kind="linear"):
    def height(self, left: float) -> float:
        return self.share_left(left)
