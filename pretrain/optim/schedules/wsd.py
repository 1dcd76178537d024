"""Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4), with a linear end as in Hägele et al. 2024."""

from dataclasses import dataclass

from cloze.schema import doc, require
from pretrain.optim.schedules.base import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class WsdConfig(ScheduleConfig, kind="wsd"):
    decay_fraction: float = doc("share of the run, at its end, in which the learning rate falls")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.decay_fraction <= 1 - self.warmup_fraction + 1e-9,  # 0.1 and 0.9 are fine
            f"schedule.decay_fraction={self.decay_fraction}: must be above 0, and at most 1 with "
            f"schedule.warmup_fraction={self.warmup_fraction} together",
        )

    def height(self, left: float) -> float:
        return min(1.0, left / self.decay_fraction)
