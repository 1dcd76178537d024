"""Learning rate as a pure function of the step: nothing to save, nothing to step."""

from pretrain.config import OptimConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (0 … steps-1), continuous where warm-up ends.

    Warm-up rises linearly and reaches optim.lr in its last step; then the rate falls linearly towards
    final_fraction * optim.lr, which it would reach at step `steps` (Devlin et al. 2019, appendix A.2).
    """
    warmup = min(steps, round(schedule.warmup_fraction * steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    return optim.lr * (schedule.final_fraction + (1.0 - schedule.final_fraction) * left)
