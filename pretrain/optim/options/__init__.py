"""The keys of `optim`: those of every optimizer here, those of one in the module of its name.

An optimizer is two modules of one name: its keys here (no torch), its `build(config, groups)` in `pretrain.optim`; and
its defaults in `conf/optim`. Nothing lists them.
"""

import importlib
import math
import pkgutil
from dataclasses import dataclass

from cloze.errors import UserError
from cloze.schema import Variant, doc


def require(condition: bool, message: str) -> None:
    """Raises `UserError` unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Variant):
    lr: float = doc("peak learning rate")
    weight_decay: float = doc("decoupled weight decay; biases and LayerNorm have none")
    clip: float = doc("largest global gradient norm; 0 does not clip")
    max_skipped_steps: int = doc("give up (exit 70) after so many steps in a row with gradients that are not finite")

    def __post_init__(self) -> None:
        require(self.clip >= 0, f"optim.clip={self.clip}: cannot be negative")
        for key in ("lr", "weight_decay"):
            require(0 <= getattr(self, key) < math.inf, f"optim.{key}={getattr(self, key)}: must be in [0, infinity)")
        require(self.max_skipped_steps >= 1, f"optim.max_skipped_steps={self.max_skipped_steps}: must be at least 1")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
