"""An encoder with pooling: texts to vectors, written and read as a directory of sentence-transformers.

The format is theirs (modules.json, 1_Pooling/config.json, …) in the spelling that every release since 2.0 reads; the
package itself is not needed. Shapes: N texts, T tokens, H width.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cloze.errors import UserError
from cloze.files import write_whole
from pretrain.evaluate.frozen_config import Pooling
from pretrain.evaluate.states import Encoder, load_encoder, pooled

_MODULES, _TRANSFORMER, _FACTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_POOLING = "1_Pooling"
_MODES = {Pooling.mean: "mean_tokens", Pooling.cls: "cls_token"}


class Embedder(nn.Module):
    """`forward` gives `{"vectors": [N, H]}`, not normalized, of a padded batch."""

    base_model_prefix = "encoder"
    more_modules: Mapping[str, str] = {}  # of sentence-transformers, behind the pooling: folders by kind

    def __init__(self, encoder: Any, pooling: Pooling, max_len: int) -> None:
        super().__init__()
        self.encoder, self.pooling, self.max_len = encoder, pooling, max_len

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def base_model(self) -> Any:
        return self.encoder

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        states_NTH = self.encoder(**inputs).last_hidden_state
        return {"vectors": pooled(states_NTH, inputs["attention_mask"], self.pooling)}

    def save_pretrained(self, folder: Path) -> None:
        """Write the directory, but for the tokenizer."""
        self.encoder.save_pretrained(folder)
        (folder / _POOLING).mkdir()
        pooling = {"word_embedding_dimension": self.config.hidden_size, "include_prompt": True}
        pooling |= {f"pooling_mode_{name}": mode is self.pooling for mode, name in _MODES.items()}
        kinds = {"Transformer": "", "Pooling": _POOLING, **self.more_modules}
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(kinds.items())
        ]
        for name, value in {
            f"{_POOLING}/config.json": pooling,
            _MODULES: modules,
            _TRANSFORMER: {"max_seq_length": self.max_len, "do_lower_case": False},
            _FACTS: {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        }.items():
            write_whole(folder / name, (json.dumps(value, indent=2) + "\n").encode())


def pooling_of(folder: Path, more: Collection[str] = ("Normalize",)) -> Pooling | None:
    """The pooling of a directory of sentence-transformers; None for a model without one.

    Raises `UserError` where it has modules besides, other than `more`, or a pooling, that this does not know.
    """
    if not (folder / _MODULES).is_file():
        return None
    kinds = [str(module["type"]).rpartition(".")[2] for module in _json(folder / _MODULES)]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {*more}:
        raise UserError(f"model={folder}: its modules are {', '.join(kinds)}; Transformer and Pooling are known here")
    told = _json(folder / _POOLING / "config.json")
    modes = {name for mode, name in _MODES.items() if told.get("pooling_mode") == mode.value}
    modes |= {key.removeprefix("pooling_mode_") for key, value in told.items() if value is True and "mode" in key}
    found = [mode for mode, name in _MODES.items() if {name} == modes]
    if not found:
        raise UserError(
            f"model={folder}: its pooling is {', '.join(sorted(modes)) or 'unknown'}; mean or cls is needed"
        )
    return found[0]


def load_embedder(folder: Path, max_len: int, pooling: Pooling | None = None) -> tuple[Encoder, Pooling]:
    """An encoder for `pretrain.evaluate.states`, and its pooling: the given one, else its directory's, else the mean.

    A directory of sentence-transformers lowers `max_len` to its own, or to its tokenizer's.
    """
    own = pooling_of(folder)
    if (folder / _TRANSFORMER).is_file():
        max_len = min(max_len, int(_json(folder / _TRANSFORMER).get("max_seq_length") or max_len))
    encoder = load_encoder(folder, max_len)
    if own is not None:
        encoder = replace(encoder, max_len=min(encoder.max_len, encoder.tokenizer.model_max_length))
    return encoder, pooling or own or Pooling.mean


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); write the model again") from None
