"""`init_from=`: a new run from the weights of an earlier one, or of any Hugging Face BERT.

Weights only: step 0, a fresh optimizer and the run's own schedule. So phase 2 at 512 follows phase 1 at 128, and a
public BERT is pretrained further on a corpus prepared with its tokenizer.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers.utils import cached_file, logging

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.model.bert import VOCABULARY_ROWS, PackedBert

_POSITIONS = "bert.embeddings.position_embeddings.weight"
_NAMES = {"num_heads": "num_attention_heads"}  # ours -> Hugging Face's
_FUNCTION = (  # what no shape tells
    *(
        "num_attention_heads",
        "hidden_act",
        "hidden_activation",
        "layer_norm_eps",
        "norm_eps",
        "position_embedding_type",
    ),
    *("global_attn_every_n_layers", "local_attention", "rope_parameters", "is_decoder"),
)
_HEADS = ("cls.", "bert.pooler.", "head.", "decoder.")  # of either architecture


def initialize(module: PackedBert, source: str, facts: TokenizerFacts) -> str:
    """Fill `module` from `source` (run, checkpoint or Hugging Face directory, or a hub name); say what was done.

    Rows of the vocabulary are matched by id, padding rows apart. Position embeddings beyond the source's keep their
    fresh values, and so do heads that it has not; positions beyond the model's are left out. Raises `UserError` where
    the tokenizer, a name or any other shape differs.
    """
    weights, fingerprint, notes = _read(source, module)
    if fingerprint != facts.fingerprint:
        raise UserError(
            f"init_from={source}: its tokenizer is {fingerprint[:12]}…, the corpus was prepared with "
            f"{facts.fingerprint[:12]}…: ids would mean other words; prepare with tokenizer.path={source}"
        )
    notes = [f"weights from {source}", *notes]
    own = dict(module.hf.named_parameters())
    for kind, names in (("no", own.keys() - weights.keys()), ("one more,", weights.keys() - own.keys())):
        if names:
            raise UserError(f"init_from={source}: has {kind} {min(names)}; choose the model options of the source")
    for name, parameter in own.items():
        given, target = weights[name], parameter.data
        if name in VOCABULARY_ROWS:
            given, target = given[: facts.vocab_size], target[: facts.vocab_size]
        elif name == _POSITIONS and len(given) != len(target):
            rows = min(len(given), len(target))
            notes.append(f"{rows} of {len(target)} positions from it")
            given, target = given[:rows], target[:rows]
        if given.shape != target.shape:
            raise UserError(
                f"init_from={source}: its {name} is {list(given.shape)}, this model's {list(target.shape)}; "
                "choose the model options of the source"
            )
        target.copy_(given)
    return ", ".join(notes)


def _refuse_other_function(source: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises `UserError` where weights of the same shapes would be used otherwise. Both are a model's configuration."""
    if other := [key for key in _FUNCTION if key in given and key in own and given[key] != own[key]]:
        key = other[0]
        raise UserError(
            f"init_from={source}: its {key} is {given[key]}, this model's {own[key]}: they would be another "
            "function; choose the model options of the source"
        )


def _read(source: str, module: PackedBert) -> tuple[Mapping[str, Tensor], str, list[str]]:
    """(weights by name, tokenizer fingerprint, what is not the source's)."""
    if found := checkpoint.named_by("init_from", source):
        snapshot = checkpoint.load(found)
        given = {_NAMES.get(key, key): value for key, value in yaml.safe_load(snapshot.config_yaml)["model"].items()}
        _refuse_other_function(source, given, module.hf.config.to_dict())
        return snapshot.weights, snapshot.state.identity.tokenizer, []
    logging.set_verbosity_error()  # it would tell at length which heads are new
    logging.disable_progress_bar()
    try:
        model, told = type(module.hf).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"init_from={source}: neither a run, a checkpoint nor a Hugging Face BERT ({reason})"
        ) from error
    _refuse_other_function(source, model.config.to_dict(), module.hf.config.to_dict())
    missing = set(told["missing_keys"])
    if body := sorted(name for name in missing if not name.startswith(_HEADS)):
        raise UserError(f"init_from={source}: has no {body[0]}; it is not a BERT of this kind")
    heads = sorted({".".join(name.split(".")[:2]) for name in missing})
    notes = [f"new: {name}, which it has not" for name in heads]
    return dict(model.named_parameters()), load_tokenizer(_tokenizer_file(source)).facts.fingerprint, notes


def _tokenizer_file(source: str) -> Path:
    """Of a directory, or downloaded from the hub."""
    for name in ("tokenizer.json", "vocab.txt"):
        with suppress(OSError):
            return Path(cached_file(source, name))
    raise UserError(f"init_from={source}: holds neither tokenizer.json nor vocab.txt; name a BERT with its tokenizer")
