"""The learning rate of a model for which none is given: small models need larger ones.

Published rates, by the number of weights in a model's layers: Google's small BERTs were tuned over 3e-4, 1e-4, 5e-5 and
3e-5 (README of google-research/bert; Turc et al. 2019), BERT-base and BERT-large over 5e-5, 3e-5 and 2e-5 (Devlin et
al. 2019, appendix A.3). LoRA takes about ten times as much (Hu et al. 2021, table 9; Schulman 2025).
"""

import json
from dataclasses import replace
from pathlib import Path

from cloze.log import log
from finetune.config import FinetuneConfig
from finetune.length import fitted

_RATES = (  # (weights of the layers at most, rate): BERT-tiny 0.4, mini 3.2, small 12.6, medium 25, base 85, large 302
    (6e6, 3e-4),
    (40e6, 1e-4),
    (150e6, 5e-5),
    (float("inf"), 2e-5),
)
_OF_NO_MODEL = 5e-5  # it is refused later, by whoever loads it
_LORA = 10.0


def settled(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with what it leaves to the model: a `max_len` that fits, and a learning rate."""
    config = fitted(config)
    if config.optim.lr is not None:
        return config
    return replace(config, optim=replace(config.optim, lr=_rate(config)))


def tell_rate(asked: FinetuneConfig, used: FinetuneConfig) -> None:
    """Say which learning rate is used, and why."""
    given = asked.optim.lr is not None
    size = layer_weights(Path(used.model))
    sized = f", by the model's size ({size / 1e6:.1f} million weights in its layers)" if size else ""
    lora = " and LoRA" if used.lora.rank else ""
    log.info(f"optim.lr={used.optim.lr:g}: " + ("as given" if given else f"the default{sized}{lora}"))


def layer_weights(folder: Path) -> float | None:
    """Weights in the matrices of the layers of the model in `folder`; None where its config.json does not say."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width, layers = int(described["hidden_size"]), int(described["num_hidden_layers"])
        inner = int(described.get("intermediate_size", 4 * width))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(layers * (4 * width * width + 2 * width * inner))


def _rate(config: FinetuneConfig) -> float:
    size = layer_weights(Path(config.model))
    rate = _OF_NO_MODEL if size is None else next(rate for most, rate in _RATES if size <= most)
    return rate * (_LORA if config.lora.rank else 1)
