"""An encoder that somebody published: a directory in Hugging Face's format, or its name on the hub, read as tensors.

Nothing of it is run: config.json is JSON, weights are safetensors, or `pytorch_model.bin` by torch's `weights_only`
loader. Names are brought to those that Hugging Face's model for pretraining has; shapes are not looked at.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError
from pretrain.model.architectures import by_model_type
from pretrain.model.blueprint import Blueprint

_TOKENIZERS = ("tokenizer.json", "vocab.txt")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of LayerNorm, as TensorFlow had them
_BUFFERS = (".position_ids", ".token_type_ids", ".inv_freq")  # which some versions saved


class Published(NamedTuple):
    """What was found."""

    name: str
    blueprint: Blueprint
    config: PreTrainedConfig
    weights: dict[str, Tensor]

    @property
    def offset(self) -> int:
        """Rows of its positions before the first."""
        return self.blueprint.position_offset(self.config.pad_token_id or 0)

    def described(self) -> dict[str, Any]:
        """The keys of `model` that it needs."""
        try:
            return self.blueprint.describe(self.config)
        except UserError as error:
            raise UserError(f"init_from={self.name}: its config.json has {error}; name another encoder") from error

    def tokenizer(self) -> CorpusTokenizer:
        """The one beside it. Raises `UserError` where there is none."""
        for file in _TOKENIZERS:
            if path := _found(self.name, file):
                return load_tokenizer(path)
        raise UserError(
            f"init_from={self.name}: holds neither {' nor '.join(_TOKENIZERS)}; name an encoder with its tokenizer"
        )


def read_published(name: str) -> Published:
    """The encoder of this name. Raises `UserError` where there is none, or it is of no architecture that is known."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = f"init_from={name}"
    try:
        path = cached_file(name, "config.json")
        reason = "it holds no config.json"
    except (OSError, ValueError) as error:
        path, reason = None, str(error).strip().partition("\n")[0]
    if path is None:
        raise UserError(f"{where}: neither a run, a checkpoint nor an encoder to be found ({reason})")
    body = _json_object(Path(path), where)
    kind = body.get("model_type")
    if not isinstance(kind, str) or kind not in by_model_type():
        raise UserError(f"{where}: its model_type is {kind!r:.60}; there are {', '.join(by_model_type())}")
    blueprint = by_model_type()[kind]
    config = blueprint.read_config(body, f"{where}: config.json")
    weights = dict(_renamed(_read_weights(name, where), blueprint))
    _have_one_head(weights, blueprint, config)
    return Published(name, blueprint, config, weights)


def _found(name: str, file: str) -> Path | None:
    path = None
    with suppress(OSError, ValueError):
        path = cached_file(name, file)
    return Path(path) if path else None


def _json_object(path: Path, where: str) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: its {path.name} is unreadable ({error}); restore it") from error
    if not isinstance(body, dict):
        raise UserError(f"{where}: its {path.name} holds no JSON object; restore it")
    return body


def _read_weights(name: str, where: str) -> dict[str, Tensor]:
    """By the names in its files; of several formats safetensors."""
    for whole in _WEIGHTS:
        read = _read_safetensors if whole.endswith(".safetensors") else _read_pickle
        if path := _found(name, whole):
            return read(path, where)
        if index := _found(name, f"{whole}.index.json"):
            return _read_shards(name, index, read, where)
    raise UserError(f"{where}: has no {' or '.join(_WEIGHTS)}; name an encoder that is saved in one of them")


def _read_shards(
    name: str, index: Path, read: Callable[[Path, str], dict[str, Tensor]], where: str
) -> dict[str, Tensor]:
    places = _json_object(index, where).get("weight_map")
    if not isinstance(places, dict) or not all(_is_plain(file) for file in places.values()):
        raise UserError(f"{where}: its {index.name} has no weight_map of plain file names; restore it")
    weights: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        path = _found(name, file)
        if not path:
            raise UserError(f"{where}: {file}, of {index.name}, is not there; restore it")
        weights |= read(path, where)
    if absent := sorted(places.keys() - weights.keys()):
        raise UserError(f"{where}: {places[absent[0]]} has no {absent[0]}, which {index.name} says; restore it")
    return weights


def _is_plain(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: its {path.name} is no whole safetensors file ({reason}); restore it") from error
    return weights


def _read_pickle(path: Path, where: str) -> dict[str, Tensor]:
    """torch refuses whatever is not made of tensors and plain containers, before it is made."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle may bring about any
        raise UserError(
            f"{where}: its {path.name} is damaged, or holds more than tensors, and is not read: a pickle may run code; "
            "ask for safetensors"
        ) from error
    weights = dict(found) if isinstance(found, Mapping) else {}
    other = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other or not weights:
        told = f"{other[0]!r:.60}, which is no tensor" if other else "no table of tensors"
        raise UserError(f"{where}: its {path.name} holds {told}; save the model's state_dict alone")
    return weights


def _renamed(weights: Mapping[str, Tensor], blueprint: Blueprint) -> Iterator[tuple[str, Tensor]]:
    """By today's names in the model for pretraining: of an encoder alone, and of an old file, too."""
    prefix = f"{blueprint.model_class.base_model_prefix}."
    bare = not any(name.startswith(prefix) for name in weights)
    for name, weight in weights.items():
        for old, new in _OLD_NAMES.items():
            name = name.removesuffix(old) + new if name.endswith(f"LayerNorm{old}") else name
        if bare and name.startswith(blueprint.encoder_parts):
            name = prefix + name
        if not name.endswith(_BUFFERS):
            yield name, weight


def _have_one_head(weights: dict[str, Tensor], blueprint: Blueprint, config: PreTrainedConfig) -> None:
    """Of weights and a bias that stand there twice, one; the weights tell whether they are tied, as to Hugging Face."""
    head, words = blueprint.tied
    same = head not in weights or (words in weights and torch.equal(weights[head], weights[words]))
    config.tie_word_embeddings = head not in weights or (same and bool(config.tie_word_embeddings))
    for second, first in blueprint.same_bias.items():
        if second in weights and (first not in weights or not config.tie_word_embeddings):
            weights[first] = weights[second]
        weights.pop(second, None)
    if config.tie_word_embeddings:
        weights.pop(head, None)
