"""LAMB (You et al. 2020)."""

from dataclasses import dataclass

from cloze.schema import doc
from pretrain.optim.options.adamw import AdamConfig


@dataclass(frozen=True, kw_only=True)
class LambConfig(AdamConfig, kind="lamb"):
    bias_correction: bool = doc("divide moments by 1 - beta^step, as AdamW always does")
