"""A vector for each text: the mean of an encoder's last hidden states, or what sentence-transformers' directory says.

The mean is over all tokens, [CLS] and [SEP] too, as sentence-transformers and what serves its models have it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.predictor import Encoded, Predictor, Trained, chosen, empty, encoded, texts
from finetune.readers import Row

Pool = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]  # [T, H] -> [H]


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


def pooling(folder: Path) -> Pool:
    """From states to a vector. Raises `UserError` for a directory of sentence-transformers that does more than that."""
    from finetune.embedder import pooling_of
    from pretrain.evaluate.frozen_config import Pooling

    root = next((path for path in (folder, folder.parent) if (path / "modules.json").is_file()), folder)
    is_first, normalizes = pooling_of(root) is Pooling.cls, False
    if root.joinpath("modules.json").is_file():
        modules = json.loads((root / "modules.json").read_text(encoding="utf-8"))
        normalizes = any(module["type"].endswith(".Normalize") for module in modules)

    def pool(states_TH: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        vector_H = states_TH[0].copy() if is_first else states_TH.mean(0)
        return np.asarray(vector_H / max(float(np.linalg.norm(vector_H)), 1e-12) if normalizes else vector_H)

    return pool
