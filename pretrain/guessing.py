"""Whether a model is any better than guessing: what a run that has gone wrong without stopping is known by.

Guessing knows no text: every word of the vocabulary is as likely as the next, a loss of ln(vocabulary) nats. (Guessing
by the words' frequencies would do better, but how frequent they are is not known of every corpus.)
"""

import math
from collections import deque
from collections.abc import Mapping

from cloze.errors import TrainingError
from pretrain.config import TrainConfig

_LINES = 5  # of metrics in a row that make a verdict
_LONG = 0.2  # of the run: until then a model may be worse than guessing, as it warms up


class LossWatch:
    """Is shown every logged loss of a run; the same on every rank, so that all say and do the same."""

    def __init__(self, config: TrainConfig, vocab_size: int) -> None:
        self._config, self._guess = config, math.log(vocab_size)
        self._mlm: deque[float] = deque(maxlen=_LINES)
        self._all: deque[float] = deque(maxlen=_LINES)
        self._said = False

    def saw(self, step: int, done: float, losses: Mapping[str, float]) -> str | None:
        """A warning, once, where losses stay above guessing; `done` is the share of the run that is trained.

        Raises `TrainingError` where they stay above guard.give_up_loss after the warm-up.
        """
        self._all.append(losses["loss"])
        if "mlm_loss" in losses:
            self._mlm.append(losses["mlm_loss"])
        limit = self._config.guard.give_up_loss
        warm = done >= self._config.schedule.warmup_fraction
        if limit is not None and warm and len(self._all) == _LINES and not any(loss <= limit for loss in self._all):
            raise TrainingError(
                f"step {step}: the loss has stayed above guard.give_up_loss={limit:g} for {_LINES} lines of metrics "
                f"(now {losses['loss']:.3f}); lower optim.lr, or warm up longer"
            )
        long_above = len(self._mlm) == _LINES and not any(loss <= self._guess for loss in self._mlm)
        if self._said or done < _LONG or not long_above:
            return None
        self._said = True
        return f"step {step}: {self._above(self._mlm[-1])}"

    @property
    def mlm_loss(self) -> float | None:
        """Of the last line of metrics."""
        return self._mlm[-1] if self._mlm else None

    def verdict(self) -> str | None:
        """What is wrong with a model that ends no better than guessing; None where nothing is known to be."""
        if not self._mlm or self._mlm[-1] <= self._guess:
            return None
        return self._above(self._mlm[-1])

    def _above(self, loss: float) -> str:
        return (
            f"masked-LM loss {loss:,.3f} is no better than guessing, {self._guess:.2f} (ln of the vocabulary): it has "
            "learned nothing so far; train longer, lower optim.lr or warm up longer"
        )
