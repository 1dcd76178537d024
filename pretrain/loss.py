"""The pretraining loss and the sums from which every metric follows.

Everything is a sum; means are taken once, over global counts: the mean of per-rank means is not the global mean.
Shapes: M masked tokens, N pairs, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import LossConfig
from pretrain.loader import IGNORED


class Losses(NamedTuple):
    """What one micro-batch adds."""

    loss: Tensor  # the scalar to differentiate
    sums: Tensor  # fp64 [4] on the device: MLM loss, NSP loss, right MLM predictions, right NSP predictions


def pretraining_loss(
    logits: tuple[Tensor, Tensor],
    mlm_labels_M: Tensor,
    nsp_labels_N: Tensor,
    *,
    weights: LossConfig,
    masked: int,
    pairs: int,
) -> Losses:
    """(sum of MLM CE)/masked * mlm_weight + (sum of NSP CE)/pairs * nsp_weight, with counts of the *global* batch.

    So gradients summed over micro-batches and ranks do not depend on how the batch is split. `pairs` is 0 where the
    corpus has none: NSP then weighs nothing. `logits` are [M, V] and [N, 2]; cross-entropy is computed in fp32.
    """
    mlm_logits_MxV, nsp_logits_Nx2 = (part.float() for part in logits)
    mlm_sum = F.cross_entropy(mlm_logits_MxV, mlm_labels_M, reduction="sum", ignore_index=IGNORED)
    nsp_sum = F.cross_entropy(nsp_logits_Nx2, nsp_labels_N, reduction="sum")
    nsp_share = weights.nsp_weight / pairs if pairs else 0.0
    loss = mlm_sum * (weights.mlm_weight / max(1, masked)) + nsp_sum * nsp_share
    with torch.no_grad():
        mlm_correct = (mlm_logits_MxV.argmax(-1) == mlm_labels_M).sum()
        nsp_correct = (nsp_logits_Nx2.argmax(-1) == nsp_labels_N).sum()
        sums = torch.stack([part.double() for part in (mlm_sum, nsp_sum, mlm_correct, nsp_correct)])
    return Losses(loss, sums)


def means(sums: Sequence[float], *, weights: LossConfig, masked: int, pairs: int) -> dict[str, float]:
    """loss, mlm_loss, nsp_loss, mlm_accuracy, nsp_accuracy from globally added `sums` and counts."""
    mlm_loss, nsp_loss, mlm_correct, nsp_correct = sums
    result = {"mlm_loss": mlm_loss / max(1, masked), "mlm_accuracy": mlm_correct / max(1, masked)}
    if pairs:
        result |= {"nsp_loss": nsp_loss / pairs, "nsp_accuracy": nsp_correct / pairs}
    loss = weights.mlm_weight * result["mlm_loss"] + weights.nsp_weight * result.get("nsp_loss", 0.0)
    return {"loss": loss, **result}
