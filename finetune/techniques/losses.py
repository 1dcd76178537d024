"""Losses of what a model learns: cross-entropy smoothed, focal or balanced, and R-Drop's divergence.

Shapes: N examples or words, L labels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cloze.errors import UserError
from finetune.keys import LossConfig
from finetune.tasks import IGNORED

Learned = list[tuple[Tensor, Tensor]]  # logits [N, L] and labels [N], or numbers [N] and numbers [N]


def learned(outputs: Any, labels: Mapping[str, Tensor]) -> Learned:
    """What a model says of what it has to learn: of the labels that are known; of numbers; of starts and of ends."""
    if "start_positions" in labels:
        return [
            (outputs.start_logits.float(), labels["start_positions"]),
            (outputs.end_logits.float(), labels["end_positions"]),
        ]
    wanted = labels["labels"]
    if wanted.is_floating_point():
        return [(outputs.logits.float().squeeze(-1), wanted)]
    return [(outputs.logits.float()[wanted != IGNORED], wanted[wanted != IGNORED])]


def mean_loss(of: Learned, loss: LossConfig, weights_L: Tensor | None) -> Tensor:
    return torch.stack([task_loss(logits, labels, loss, weights_L) for logits, labels in of]).mean()


def task_loss(logits_NL: Tensor, labels_N: Tensor, loss: LossConfig, weights_L: Tensor | None) -> Tensor:
    """Cross-entropy, smoothed (Szegedy et al. 2016, section 7) or focal (Lin et al. 2017, eq. 5); MSE of numbers."""
    if labels_N.is_floating_point():
        return nn.functional.mse_loss(logits_NL, labels_N)
    smoothing = loss.label_smoothing
    each_N = nn.functional.cross_entropy(logits_NL, labels_N, weights_L, reduction="none", label_smoothing=smoothing)
    if loss.focal_gamma:
        right_N = logits_NL.softmax(-1).gather(-1, labels_N[:, None]).squeeze(-1)
        each_N = (1 - right_N) ** loss.focal_gamma * each_N
    return each_N.mean() if weights_L is None else each_N.sum() / weights_L[labels_N].sum()


def balanced_weights(labels_N: Tensor, num_labels: int) -> Tensor:
    """N / (L * count) for each label, so that every label weighs the same in all."""
    counts_L = torch.bincount(labels_N[labels_N != IGNORED], minlength=num_labels)
    return counts_L.sum() / (num_labels * counts_L.clamp(min=1))


def symmetric_kl(first_NL: Tensor, second_NL: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of two sets of logits, mean over N (R-Drop, Liang et al. 2021, equation 2)."""
    p, q = first_NL.log_softmax(-1), second_NL.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def has_dropout(model: nn.Module) -> bool:
    """Whether two draws of `model` differ."""
    return any(module.p for module in model.modules() if isinstance(module, nn.Dropout))


def require_dropout(model: nn.Module) -> None:
    """Raises `UserError` where two draws of `model` would be the same: loss.r_drop could do nothing."""
    if not has_dropout(model):
        raise UserError(
            "loss.r_drop: the model has no dropout, so it can do nothing; set dropout=0.1, or loss.r_drop=0"
        )
