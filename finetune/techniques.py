"""What can be done besides plain fine-tuning: losses, adversaries, layers that learn less, LoRA, distillation.

Functions of tensors and modules, each with its paper; train.py puts them into Hugging Face's Trainer.
Shapes: N examples or words, L labels, H hidden units.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cloze.errors import UserError
from finetune.config import LossConfig, OptimConfig

IGNORED = -100  # label of positions that have none


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


def soft_targets(student_NL: Tensor, teacher_NL: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both softened by T, mean over N (Hinton et al. 2015, section 2); of numbers, MSE."""
    if student_NL.ndim == 1:
        return nn.functional.mse_loss(student_NL, teacher_NL)
    student, teacher = (student_NL / temperature).log_softmax(-1), (teacher_NL / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def ascent(gradient: Tensor, length: float) -> Tensor:
    """`gradient` scaled to the L2 norm `length`; zeros stay zeros."""
    norm = gradient.norm()
    return gradient * (length / norm) if norm > 0 else torch.zeros_like(gradient)


def depth(name: str, num_layers: int) -> int:
    """0 for a parameter of the embeddings, i + 1 for one of layer i, num_layers + 1 for what stands above."""
    if match := re.search(r"\blayers?\.(\d+)\.", name):
        return int(match.group(1)) + 1
    return 0 if "embeddings." in name else num_layers + 1


def parameter_groups(model: nn.Module, optim: OptimConfig, num_layers: int) -> list[dict[str, Any]]:
    """Groups for AdamW: the learning rate falls by `layer_decay` per layer (Howard and Ruder 2018, section 3.2)."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = optim.lr * optim.layer_decay ** (num_layers + 1 - depth(name, num_layers))
            lr = optim.crf_lr if re.search(r"\bcrf\.", name) else lr
            groups.setdefault((lr, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": optim.weight_decay if decays else 0.0}
        for (lr, decays), parameters in groups.items()
    ]


def freeze(model: nn.Module, num_frozen: int, num_layers: int) -> None:
    """The embeddings and the lowest `num_frozen` layers keep their weights."""
    if num_frozen > num_layers:
        raise UserError(f"freeze_layers={num_frozen}: the model has {num_layers} layers")
    for name, parameter in model.named_parameters():
        if depth(name, num_layers) <= num_frozen:
            parameter.requires_grad = False


def with_lora(model: Any, rank: int, alpha: float, dropout: float) -> Any:
    """`model` with low-rank updates in each linear layer of its encoder; what is new is trained whole."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise UserError("lora.rank: needs peft: pip install 'cloze[finetune]'") from None
    encoder = model.base_model_prefix
    new = [name for name, child in model.named_children() if name != encoder and any(True for _ in child.parameters())]
    linear = [f"{encoder}.{name}" for name, child in model.base_model.named_modules() if isinstance(child, nn.Linear)]
    own = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear, modules_to_save=new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a property of transformers that peft reads
        return get_peft_model(model, own)


class Teacher(nn.Module):
    """A fine-tuned model that a smaller one imitates: its logits, and its hidden states through a learned projection.

    Layer i of the student is compared with the teacher's layer i * (teacher's layers / student's), as in TinyBERT
    (Jiao et al. 2020, section 3.1).
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        wide, narrow = teacher.config.hidden_size, student.config.hidden_size
        self.project = nn.Linear(narrow, wide, bias=False) if narrow != wide else nn.Identity()
        self.ratio = teacher.config.num_hidden_layers / student.config.num_hidden_layers

    def forward(
        self, inputs: dict[str, Tensor], labels: Mapping[str, Tensor], student: Any, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(soft-target loss, mean squared error of the hidden states at the attended tokens)."""
        with torch.no_grad():
            own = self.teacher.eval()(**inputs, output_hidden_states=True)
        pairs = zip(learned(student, labels), learned(own, labels), strict=True)
        soft = torch.stack([soft_targets(mine, its, temperature) for (mine, _), (its, _) in pairs]).mean()
        attended_BT = inputs["attention_mask"].bool()
        errors = [
            nn.functional.mse_loss(
                self.project(hidden[attended_BT]), own.hidden_states[round(i * self.ratio)][attended_BT]
            )
            for i, hidden in enumerate(student.hidden_states)
        ]
        return soft, torch.stack(errors).mean()
