"""A vector for each text: the mean of an encoder's last hidden states, or what sentence-transformers' directory says.

The mean is over all tokens, [CLS] and [SEP] too, as sentence-transformers and what serves its models have it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from finetune.prediction.trained import Encoded, Predictor, Trained, chosen, empty, encoded, texts
from finetune.readers import Row

_KNOWN = ("Transformer", "Pooling", "Normalize")

Pooling = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]  # [T, H] -> [H]


def predictor(trained: Trained, first: Row) -> Predictor:
    layout = chosen(trained.layouts, first)
    pool = pooling(trained.folder)

    def encode(rows: Sequence[Row]) -> Encoded:
        found = texts(rows, layout)
        features, cut = encoded(found, trained)
        lengths = [len(feature["input_ids"]) for feature in features]
        return Encoded(
            features,
            lambda number, outputs: pool(outputs[0][: lengths[number]]),
            lambda vectors: ({"vector": [float(f"{x:.6g}") for x in vector.tolist()]} for vector in vectors),  # lazily
            cut,
            empty(found),
        )

    return Predictor(auto_class="AutoModel", adds=("vector",), encode=encode, outputs=("last_hidden_state",))


def pooling(folder: Path) -> Pooling:
    """From states to a vector. Raises `UserError` for a directory of sentence-transformers that does more than that."""
    root = next((path for path in (folder, folder.parent) if (path / "modules.json").is_file()), None)
    modules = json.loads((root / "modules.json").read_text(encoding="utf-8")) if root else []
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if other := next((kind for kind in kinds if kind not in _KNOWN), None):
        raise UserError(f"model={folder}: has a module {other}; load it with sentence-transformers")
    asked: dict[str, Any] = {}
    if root and "Pooling" in kinds:
        asked = json.loads((root / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
    modes = [name for name, value in asked.items() if name.startswith("pooling_mode") and value not in (False, None)]
    mode = str(asked["pooling_mode"]) if "pooling_mode" in asked else (modes or ["mean"])[0]
    if len(modes) > 1 or not mode.endswith(("mean", "mean_tokens", "cls", "cls_token")):
        raise UserError(f"model={folder}: pools by {', '.join(modes)}; load it with sentence-transformers")

    def pool(states_TH: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        vector_H = states_TH[0].copy() if "cls" in mode else states_TH.mean(0)
        return np.asarray(vector_H / max(float(np.linalg.norm(vector_H)), 1e-12) if "Normalize" in kinds else vector_H)

    return pool
