"""The values of a phase's curves by the samples that its run has consumed. Pure: knows no run."""

from dataclasses import replace

from pretrain.config import LossConfig, batch_size
from pretrain.phases import Phase

_BATCH = "global_batch_size"


class Curriculum:
    """Of one phase, over all starts of its run."""

    def __init__(self, phase: Phase) -> None:
        self._phase, self._curves = phase, phase.config.curves
        self.changing = tuple(key for key, curve in self._curves.items() if not curve.is_constant)

    def at(self, samples: int) -> dict[str, float]:
        """The value of every curve, by key, in the step that begins when so many samples are consumed."""
        found = {key: curve.at(self._phase.span_of(key).share(samples)) for key, curve in self._curves.items()}
        return found | {_BATCH: float(self.batch_size(samples))}

    def batch_size(self, samples: int) -> int:
        """Samples of that step, of a curve of batch sizes."""
        return batch_size(self._phase.span_of(_BATCH).share(samples), self._phase.config)

    def loss(self, samples: int) -> LossConfig:
        """The weights of the losses in that step."""
        loss = self._phase.config.loss
        if not any(key in self.changing for key in loss.curves):
            return loss
        shares = {key: self._phase.span_of(key).share(samples) for key in loss.curves}
        return replace(loss, **{key.removeprefix("loss."): curve.at(shares[key]) for key, curve in loss.curves.items()})
