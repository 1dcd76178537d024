"""Learning from a fine-tuned model: its softened outputs (Hinton et al. 2015), its hidden states (Jiao et al. 2020).

Shapes: N examples or words, L labels, B texts, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.techniques.losses import learned


def soft_targets(student_NL: Tensor, teacher_NL: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both softened by T, mean over N (Hinton et al. 2015, section 2); of numbers, MSE."""
    if student_NL.ndim == 1:
        return nn.functional.mse_loss(student_NL, teacher_NL)
    student, teacher = (student_NL / temperature).log_softmax(-1), (teacher_NL / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


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
