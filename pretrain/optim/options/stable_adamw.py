"""StableAdamW (Wortsman et al. 2023)."""

from dataclasses import dataclass

from pretrain.optim.options.adamw import AdamwConfig


@dataclass(frozen=True, kw_only=True)
class StableAdamwConfig(AdamwConfig, kind="stable_adamw"):
    """AdamW's keys, and its rates."""
