"""AdamW (Loshchilov and Hutter 2019), and what those have that give some parameters to it."""

import math
from dataclasses import dataclass

from cloze.schema import doc, require
from pretrain.optim.options.base import OptimConfig


@dataclass(frozen=True, kw_only=True)
class AdamConfig(OptimConfig):
    beta1: float = doc("decay of the first moment")
    beta2: float = doc("decay of the second moment")
    eps: float = doc("added to the root of the second moment")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.eps < math.inf, f"optim.eps={self.eps}: must be positive")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"optim.{key}={getattr(self, key)}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class AdamwConfig(AdamConfig, kind="adamw"):
    def lr_for(self, width: int) -> float:
        """4e-3 at 128, 1e-3 at 256 (the best of those tried here, docs/LOG.md), about BERT's 1e-4 at 768.

        That it falls with the square of the width is a guess that fits these three.
        """
        return float(f"{4e-3 * (128 / width) ** 2:.2g}")
