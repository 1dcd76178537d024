"""Muon (Jordan et al. 2024)."""

from dataclasses import dataclass

from cloze.schema import doc, require
from pretrain.optim.options.adamw import AdamConfig


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamConfig, kind="muon"):
    momentum: float = doc("decay of the momentum of the layers' matrices; AdamW takes the rest")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, f"optim.momentum={self.momentum}: must be in [0, 1)")

    def lr_for(self, width: int) -> float:
        """4e-3 at 128, 2e-3 at 256 (the best of those tried here, docs/LOG.md); what follows from them is a guess."""
        return float(f"{4e-3 * 128 / width:.2g}")
