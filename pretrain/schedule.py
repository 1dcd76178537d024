"""Learning rate as a pure function of how far the run is: nothing to save, nothing to step."""

from pretrain.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0 … steps-1) of a run of `steps`."""
    return rate_between(step / steps, (step + 1) / steps, optim, schedule)


def rate_between(done: float, after: float, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of a step that takes the run from `done` to `after`, both shares of the whole in [0, 1].

    Under a time budget both are the share of it that is spent. Warm-up rises linearly to optim.lr at its end; then the
    rate falls linearly and would reach final_fraction * optim.lr at 1: continuous where they meet (Devlin et al. 2019,
    appendix A.2).
    """
    warmup = schedule.warmup_fraction
    if after <= warmup:
        return optim.lr * after / warmup
    left = (1.0 - max(done, warmup)) / (1.0 - warmup) if warmup < 1.0 else 0.0
    return optim.lr * (schedule.final_fraction + (1.0 - schedule.final_fraction) * max(0.0, left))
