"""The keys of every optimizer."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from cloze.errors import UserError
from cloze.schema import Variant, doc, require
from pretrain.curves import Curve, is_curve, parse_curve


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Variant):
    lr: Any = doc(
        "peak learning rate; null: one that suits the model's width, told at the start; a curve: in place of schedule"
    )
    weight_decay: float = doc("decoupled weight decay; biases and LayerNorm have none")
    clip: float = doc("largest global gradient norm; 0 does not clip")
    max_skipped_steps: int = doc("give up (exit 70) after so many steps in a row with gradients that are not finite")

    lr_is_default: ClassVar[bool] = False  # True where `with_lr` chose it: a resumed run keeps its own instead

    def __post_init__(self) -> None:
        require(self.clip >= 0, f"optim.clip={self.clip}: cannot be negative")
        if self.lr is not None:
            parse_curve(self.lr, "optim.lr", least=0.0)
        decay = self.weight_decay
        require(0 <= decay < math.inf, f"optim.weight_decay={decay}: must be in [0, infinity)")
        require(self.max_skipped_steps >= 1, f"optim.max_skipped_steps={self.max_skipped_steps}: must be at least 1")

    @property
    def peak_lr(self) -> float:
        """`lr`, once it is known: `with_lr` was asked, or it was given."""
        assert self.lr is not None
        return parse_curve(self.lr, "optim.lr", least=0.0).peak

    @property
    def rates(self) -> Curve | None:
        """The learning rate over the run, where `lr` says it in place of the schedule."""
        return parse_curve(self.lr, "optim.lr", least=0.0) if is_curve(self.lr) else None

    def with_lr(self, width: int) -> Self:
        """The same with a learning rate, for a model of this hidden size. Raises `UserError` where none suits all."""
        if self.lr is not None:
            return self
        chosen = replace(self, lr=self.lr_for(width))
        object.__setattr__(chosen, "lr_is_default", True)
        return chosen

    def lr_for(self, width: int) -> float:
        """Peak learning rate for a model of this hidden size, where none is given."""
        raise UserError("optim.lr=null: this optimizer's depends on the batch; give a number, as its recipe has it")
