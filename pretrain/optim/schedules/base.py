"""The keys of every schedule."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from cloze.schema import Variant, doc, require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Variant, ABC):
    warmup_fraction: float = doc("share of the run in which the learning rate rises linearly to optim.lr")
    start_fraction: float = doc("learning rate from which it rises, as a share of optim.lr")
    final_fraction: float = doc("learning rate at the end of the run, as a share of optim.lr")

    def __post_init__(self) -> None:
        for key in ("warmup_fraction", "start_fraction", "final_fraction"):
            require(0 <= getattr(self, key) <= 1, f"schedule.{key}={getattr(self, key)}: must be in [0, 1]")

    @abstractmethod
    def height(self, left: float) -> float:
        """From 1, where warm-up has ended, to 0: of the way between the final and the peak learning rate.

        `left` is the share of the run that is left, from 1 - warmup_fraction down to 0.
        """

    def share_left(self, left: float) -> float:
        """The same as a share of the run after warm-up."""
        return left / (1.0 - self.warmup_fraction) if self.warmup_fraction < 1.0 else 0.0
