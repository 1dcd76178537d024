"""The pretraining loss and the sums from which every metric follows.

Everything is a sum; means are taken once, over global counts: the mean of per-rank means is not the global mean.
Shapes: M masked tokens, N pairs, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import LossConfig
from pretrain.data.loader import IGNORED


class Losses(NamedTuple):
    """What one micro-batch adds."""

    loss: Tensor  # the scalar to differentiate
    sums: Tensor  # fp64 [4] on the device: MLM loss, NSP loss, right MLM predictions, right NSP predictions


CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}  # logits at a time: what a CPU's cache holds, what fills a GPU


class _MaskedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies and right predictions over rows, in one pass that leaves nothing but the gradient.

    The logits are the largest tensor of a step. Autograd would keep their log-softmax in fp32 and make two more copies
    on the way back; here the softmax of a few rows lives in fp32 and becomes the gradient, in the logits' type, at
    once, and in their place: they are overwritten where a gradient is asked for. (liger-kernel does so in Triton, but
    asks the device for a count in every call: the host would wait.)

    `z_weight` times the squared log of the softmax's denominator Z is added to what is differentiated, which keeps
    log Z near 0 (z-loss: Chowdhery et al. 2022, PaLM, section 5). The gradient of (log Z)^2 is 2 log Z * softmax.
    """

    @staticmethod
    def forward(ctx: Any, logits_MxV: Tensor, labels_M: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """(what is differentiated, the sum of cross-entropies, right predictions), each an fp32 scalar."""
        gradient_MxV = logits_MxV.detach() if ctx.needs_input_grad[0] else None  # no copy
        loss, z_loss, correct = (torch.zeros((), dtype=torch.float32, device=logits_MxV.device) for _ in range(3))
        rows = _rows_at_a_time(logits_MxV)
        for start in range(0, len(labels_M), rows):
            labels = labels_M[start : start + rows]
            counts = labels != IGNORED
            targets = torch.where(counts, labels, 0)[:, None]
            log_probs = F.log_softmax(logits_MxV[start : start + rows], dim=-1, dtype=torch.float32)
            loss -= (log_probs.gather(1, targets)[:, 0] * counts).sum()
            correct += _num_right(log_probs, labels, targets)
            if z_weight:  # any logit less its log-probability is log Z
                log_z = logits_MxV[start : start + rows].gather(1, targets).float() - log_probs.gather(1, targets)
                z_loss += z_weight * (log_z[:, 0].square() * counts).sum()
            if gradient_MxV is not None:
                probs = log_probs.exp_()
                if z_weight:
                    probs *= 1 + 2 * z_weight * log_z
                probs.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=probs.dtype))
                torch.mul(probs, counts[:, None], out=gradient_MxV[start : start + rows])
        ctx.save_for_backward(gradient_MxV)
        differentiated = loss + z_loss
        ctx.mark_non_differentiable(loss, correct)
        return differentiated, loss, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MxV,) = ctx.saved_tensors
        if gradient_MxV.dtype is torch.float32:
            return gradient_MxV.mul_(grad_outputs[0]), None, None
        for rows in gradient_MxV.split(_rows_at_a_time(gradient_MxV)):
            rows.copy_(rows.float() * grad_outputs[0])  # the factor in fp32: in bf16 it would be off by up to 0.4%
        return gradient_MxV, None, None


def _num_right(log_probs_MxV: Tensor, labels_M: Tensor, targets_Mx1: Tensor) -> Tensor:
    """How many labels have the highest probability; the first of several counts as that."""
    if log_probs_MxV.device.type == "cpu":  # amax is 16 times as fast as argmax there: who is below it is wrong
        best_M = log_probs_MxV.gather(1, targets_Mx1)[:, 0] == log_probs_MxV.amax(-1)
        log_probs_MxV, labels_M = log_probs_MxV[best_M], labels_M[best_M]
    return (log_probs_MxV.argmax(-1) == labels_M).sum()


def _rows_at_a_time(logits_MxV: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS[logits_MxV.device.type] // logits_MxV.shape[1])


_masked_cross_entropy: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]] = _MaskedCrossEntropy.apply


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
    corpus has none: NSP then weighs nothing. `logits` are [M, V] and [N, 2]; cross-entropy is computed in fp32. Where
    gradients are asked for, the MLM logits are overwritten. The z-loss adds to `loss`, not to `sums`: losses that are
    logged compare with those of a run without it.
    """
    mlm_loss, mlm_sum, mlm_correct = _masked_cross_entropy(logits[0], mlm_labels_M, weights.z_loss_weight)
    nsp_logits_Nx2 = logits[1].float()
    nsp_sum = F.cross_entropy(nsp_logits_Nx2, nsp_labels_N, reduction="sum")
    nsp_share = weights.nsp_weight / pairs if pairs else 0.0
    loss = mlm_loss * (weights.mlm_weight / max(1, masked)) + nsp_sum * nsp_share
    with torch.no_grad():
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
