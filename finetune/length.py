"""How long samples may be: what max_len asks for, as far as the model has positions."""

import json
from dataclasses import replace
from pathlib import Path

from finetune.config import FinetuneConfig

# Of these the positions begin behind the padding's: 514 hold 512 tokens.
_FROM_PADDING = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text"),
    *("longformer", "mpnet"),
}


def fitted(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with a max_len that the model has positions for.

    A directory that holds no model is left for the one who loads it to complain of.
    """
    positions = _positions(Path(config.model))
    if positions is None or config.max_len <= positions:
        return config
    return replace(config, max_len=positions)


def _positions(folder: Path) -> int | None:
    """Tokens that the model in `folder` has positions for; None where its config.json does not say."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        positions = int(described["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        positions - int(described.get("pad_token_id") or 0) - 1
        if described.get("model_type") in _FROM_PADDING
        else positions
    )
