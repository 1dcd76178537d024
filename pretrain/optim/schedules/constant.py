"""No decay."""

from dataclasses import dataclass

from pretrain.optim.schedules.base import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class ConstantConfig(ScheduleConfig, kind="constant"):
    def height(self, left: float) -> float:
        del left
        return 1.0
