"""Learning rate as a pure function of how far the run is: nothing to save, nothing to step."""

from pretrain.optim.options import OptimConfig
from pretrain.optim.schedules import ScheduleConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0 … steps-1) of a run of `steps`."""
    return rate_between(step / steps, (step + 1) / steps, optim, schedule)


def rate_between(done: float, after: float, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of a step that takes the run from `done` to `after`, both shares of the whole in [0, 1].

    Under a time budget both are the share of it that is spent. Warm-up rises linearly from start_fraction * optim.lr to
    optim.lr at its end (Devlin et al. 2019, appendix A.2). Every decay starts there, at optim.lr, and ends at
    final_fraction * optim.lr at 1: continuous where they meet.
    """
    warmup = schedule.warmup_fraction
    if after <= warmup:
        return optim.lr * (schedule.start_fraction + (1.0 - schedule.start_fraction) * after / warmup)
    left = max(0.0, 1.0 - max(done, warmup))
    height = schedule.height(left)
    return optim.lr * (schedule.final_fraction + (1.0 - schedule.final_fraction) * height)
