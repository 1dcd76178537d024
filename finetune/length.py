"""How long samples may be: what max_len asks for, as far as the model has positions."""

from dataclasses import replace
from pathlib import Path

from finetune.config import FinetuneConfig
from pretrain.export.positions import num_positions


def fitted(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with a max_len that the model has positions for.

    A directory that holds no model is left for the one who loads it to complain of.
    """
    positions = num_positions(Path(config.model))
    if positions is None or config.max_len <= positions:
        return config
    return replace(config, max_len=positions)
