"""Models to be fine-tuned, their tokenizers and teachers, as a configuration names them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from cloze.errors import UserError
from cloze.log import log
from finetune.keys import Init
from finetune.tasks import TaskConfig
from pretrain.export.hugging_face import load_pretrained, load_tokenizer, loading


def load_encoder_tokenizer(config: TaskConfig, *, split_into_words: bool = False) -> Any:
    """The tokenizer of `config.model`, for so long samples as `config` has; more than it is made for are warned of."""
    tokenizer = load_tokenizer(Path(config.model), split_into_words=split_into_words)
    if config.max_len > tokenizer.model_max_length:
        seen = f"its tokenizer is made for {tokenizer.model_max_length} tokens, which is what pretraining saw"
        log.warning(f"max_len={config.max_len}: model={config.model}: {seen}; positions beyond may know little")
    return tokenizer


def load_model(config: TaskConfig, auto_class: Any, names: Sequence[str] | None = None, **head: Any) -> Any:
    """The model with the head of `auto_class`, for the labels `names`; its new layers are random, or all of it is.

    Raises `UserError` where the directory has other labels, or lacks weights of the encoder (but the pooler's).
    """
    folder = Path(config.model)
    if names is not None:
        head |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with loading(folder):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = AutoConfig.from_pretrained(folder, **head)
    if config.dropout is not None:
        for name, value in shape.to_dict().items():
            if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(shape, name, config.dropout)
    if config.pooling is not None and hasattr(shape, "classifier_pooling"):  # ModernBERT's
        shape.classifier_pooling = config.pooling.value
    kind = auto_class.__name__.removeprefix("AutoModel")
    before = described.get("id2label", {"0": "", "1": ""})
    head_is_there = any(name.endswith(kind) for name in described.get("architectures") or [])
    if names is not None and head_is_there and len(before) != len(names):
        raise UserError(
            f"model={folder}: was fine-tuned for {len(before)} labels ({', '.join(map(str, before.values()))}), "
            f"the data have {len(names)}: {', '.join(names[:10])}; name the pretrained model"
        )
    if config.init is Init.random:
        return auto_class.from_config(shape)
    with loading(folder):
        model, told = auto_class.from_pretrained(folder, config=shape, dtype=torch.float32, output_loading_info=True)
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    if missing := sorted(key for key in told["missing_keys"] if key.startswith(encoder) and "pooler." not in key):
        raise UserError(
            f"model={folder}: has no {missing[0]}, nor {len(missing) - 1} other weights of the encoder, which would be "
            f"random; are its names those of {type(model).__name__}? Or ask for random weights by init=random"
        )
    return model.eval()


def load_teacher(
    config: TaskConfig, auto_class: Any, names: Sequence[str] | None, tokenizer: Any, load: Any = load_pretrained
) -> Any:
    """The model that distill.teacher names, by `load`, or None. It must know the same tokens and, if any, `names`."""
    if config.distill.teacher is None:
        return None
    folder, key = Path(config.distill.teacher), "distill.teacher"
    if load_tokenizer(folder, key).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{key}={folder}: has another vocabulary than model={config.model}; both need the same tokenizer"
        )
    teacher = load(auto_class, folder, key, purpose="a teacher")
    if names is not None and [teacher.config.id2label[i] for i in range(teacher.config.num_labels)] != list(names):
        shown = ", ".join(teacher.config.id2label.values())
        raise UserError(f"{key}={folder}: its labels are {shown}; data.train has {', '.join(names)}")
    return teacher
