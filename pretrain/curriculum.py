"""The values of a run's curves by the samples that it has consumed. Pure: knows the configuration, not the run."""

from pretrain.config import TrainConfig, batch_size, total_samples


class Curriculum:
    """Of one run, over all of its starts."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._curves = config, config.curves
        self._total = total_samples(config)
        self.changing = tuple(key for key, curve in self._curves.items() if not curve.is_constant)

    def share(self, samples: int) -> float:
        """Of the run's samples, in [0, 1], where so many are consumed."""
        return min(1.0, samples / self._total)

    def at(self, samples: int) -> dict[str, float]:
        """The value of every curve, by key, in the step that begins when so many samples are consumed."""
        share = self.share(samples)
        sizes = {"global_batch_size": float(batch_size(share, self._config))}
        return {key: curve.at(share) for key, curve in self._curves.items()} | sizes
