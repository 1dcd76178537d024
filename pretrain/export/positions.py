"""How many tokens a model in Hugging Face's format takes at once. Needs neither torch nor transformers."""

import json
from pathlib import Path

# Of these the positions begin behind the padding's: 514 hold 512 tokens.
_FROM_PADDING = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "data2vec-text"),
    *("longformer", "mpnet"),
}


def num_positions(folder: Path) -> int | None:
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
