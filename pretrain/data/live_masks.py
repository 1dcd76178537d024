"""Masks of another rate than the corpus was prepared with, or of one that changes over the run.

The rate is that of each sample's own position in the run, so masks depend neither on the batch nor on the ranks. Where
rate and shares are the corpus' own, so are the masks: the mask function is the same, and baked ones serve.
Shapes: N samples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.corpus.manifest import Manifest
from cloze.corpus.masking import MASK_SHARE, RANDOM_SHARE, MaskRates
from cloze.errors import UserError
from pretrain.config import DataConfig
from pretrain.curves import Curve

_OWN = {"data.mask_share": MASK_SHARE, "data.random_share": RANDOM_SHARE}


class LiveMasks(NamedTuple):
    """How to mask over a run."""

    probability: Curve | None  # None: the corpus' own
    mask_share: Curve
    random_share: Curve
    total_samples: int  # over which the curves go
    first: int = 0  # position at which they begin

    def rates(self, positions_N: npt.NDArray[np.int64], corpus_probability: float) -> MaskRates | None:
        """Of the samples at these run positions; None where all are as the corpus has them."""
        shares = np.clip((positions_N - self.first) / self.total_samples, 0.0, 1.0).tolist()
        own = corpus_probability, MASK_SHARE, RANDOM_SHARE
        curves = self.probability or Curve(((0.0, corpus_probability),)), self.mask_share, self.random_share
        found = MaskRates(*(np.array([curve.at(share) for share in shares]) for curve in curves))
        return None if all((values == value).all() for values, value in zip(found, own, strict=True)) else found


def live_masks(data: DataConfig, total_samples: int, first: int = 0) -> LiveMasks | None:
    """What the configuration asks for; None where it asks for nothing but the corpus' masks."""
    curves = data.curves
    if "data.masking_probability" not in curves and all(set(curves[key].values) == {own} for key, own in _OWN.items()):
        return None
    probability = curves.get("data.masking_probability")
    return LiveMasks(probability, curves["data.mask_share"], curves["data.random_share"], total_samples, first)


def check_masking(data: DataConfig, manifest: Manifest) -> None:
    """Raises `UserError` where a masking probability needs more predictions than the corpus allows a sample."""
    curve, masking = data.curves.get("data.masking_probability"), manifest.masking
    if curve is None or curve.peak <= masking.probability:
        return
    wanted = round(curve.peak * manifest.max_len)
    if wanted > masking.max_predictions:
        raise UserError(
            f"data.masking_probability: {curve.peak:g} of {manifest.max_len} tokens are {wanted} predictions, and the "
            f"corpus has at most {masking.max_predictions}; lower it, or prepare with masking.max_predictions={wanted}"
        )
