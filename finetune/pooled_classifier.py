"""A head upon pooled states, for encoders whose own head in transformers reads [CLS] alone.

A masked language model without sentence pairs was never asked for a [CLS] that says something of the text; the mean of
its states does. transformers cannot hold such a head for BERT's and RoBERTa's kind (ModernBERT's can, and keeps its
own), so the directory is one of sentence-transformers: Transformer, Pooling, Dense, whose vector is the logits. Its
config.json names an architecture of ours, and transformers' own loader finds no head in it and says so.
Shapes: N texts, T tokens, H width, L labels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from cloze.errors import UserError
from cloze.files import json_object, write_whole
from finetune.embedder import Embedder, pooling_of
from finetune.models import load_model
from finetune.tasks import TaskConfig
from pretrain.evaluate.frozen_config import Pooling
from pretrain.evaluate.states import pooled
from pretrain.export.hugging_face import load_pretrained, loading

_ARCHITECTURE = "PooledForSequenceClassification"
_DENSE = "2_Dense"


class PooledClassifier(Embedder):
    """Logits [N, L] of a padded batch, or one number each; a loss where there are labels."""

    more_modules: Mapping[str, str] = {"Dense": _DENSE}

    def __init__(self, encoder: Any, pooling: Pooling, max_len: int) -> None:
        super().__init__(encoder, pooling, max_len)
        shape = encoder.config
        own = getattr(shape, "classifier_dropout", None)
        self.dropout = nn.Dropout(getattr(shape, "hidden_dropout_prob", 0.0) if own is None else own)
        self.classifier = nn.Linear(shape.hidden_size, shape.num_labels)
        nn.init.normal_(self.classifier.weight, std=getattr(shape, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    def forward(  # type: ignore[override]  # every input by name: the Trainer looks which there are
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **segments}
        found = self.encoder(**inputs, output_hidden_states=output_hidden_states)
        vectors_NH = pooled(found.last_hidden_state, attention_mask, self.pooling)
        logits_NL = self.classifier(self.dropout(vectors_NH))
        loss = None
        if labels is not None:
            numbers = labels.is_floating_point()
            loss = (
                nn.functional.mse_loss(logits_NL[:, 0], labels)
                if numbers
                else nn.functional.cross_entropy(logits_NL, labels)
            )
        return SequenceClassifierOutput(loss=loss, logits=logits_NL, hidden_states=found.hidden_states)

    def save_pretrained(self, folder: Path) -> None:
        """Write the directory, but for the tokenizer."""
        super().save_pretrained(folder)
        described = json_object(folder / "config.json") | {"architectures": [_ARCHITECTURE]}
        write_whole(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())
        (folder / _DENSE).mkdir()
        shape: dict[str, Any] = {
            "in_features": self.classifier.in_features,
            "out_features": self.classifier.out_features,
            "bias": True,
        }
        shape["activation_function"] = "torch.nn.modules.linear.Identity"
        write_whole(folder / _DENSE / "config.json", (json.dumps(shape, indent=2) + "\n").encode())
        own = {f"linear.{name}": value.contiguous() for name, value in self.classifier.state_dict().items()}
        save_file(own, folder / _DENSE / "model.safetensors", {"format": "pt"})


def is_pooled(folder: Path) -> bool:
    """Whether the model in `folder` is one of these."""
    return json_object(folder / "config.json").get("architectures") == [_ARCHITECTURE]


def pooling_beside(config: TaskConfig) -> Pooling | None:
    """What such a head is to read, where the model's own cannot; None where transformers' has what is asked for."""
    described = json_object(Path(config.model) / "config.json")
    if "classifier_pooling" in described:
        return None
    is_ours = is_pooled(Path(config.model)) and config.pooling is not Pooling.cls
    return Pooling.mean if is_ours or config.pooling is Pooling.mean else None


def load_trained(auto_class: Any, folder: Path, key: str = "model", *, purpose: str = "") -> Any:
    """As `load_pretrained`, and such a model by itself."""
    return load_pooled(folder, key) if is_pooled(folder) else load_pretrained(auto_class, folder, key, purpose=purpose)


def load_pooled(folder: Path | str, key: str = "model") -> PooledClassifier:
    """A written model, ready to predict. Raises `UserError` where the directory holds no such, or not all of it."""
    folder = Path(folder)
    if not is_pooled(folder):
        raise UserError(f"{key}={folder}: has no head upon pooled states; load it by transformers")
    encoder = load_pretrained(AutoModel, folder, key, purpose="predicting")
    return _with_head(
        encoder, folder, json_object(folder / "sentence_bert_config.json").get("max_seq_length", 512), key
    )


def pooled_classifier(config: TaskConfig, pooling: Pooling, names: Sequence[str] | None) -> PooledClassifier:
    """`config.model` with a head for the labels `names`, or for a number; that of its directory, where it has one.

    Raises `UserError` as `load_model` does, and where the directory's head has another number of labels.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if names is not None:
        head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    folder, encoder = Path(config.model), load_model(config, AutoModel, **head)
    if is_pooled(folder) and config.init.value == "pretrained":
        return _with_head(encoder, folder, config.max_len, "model")
    return PooledClassifier(encoder, pooling, config.max_len)


def _with_head(encoder: Any, folder: Path, max_len: int, key: str) -> PooledClassifier:
    pooling = pooling_of(folder, more=[*PooledClassifier.more_modules])
    assert pooling is not None, "an architecture of ours has modules.json"
    model = PooledClassifier(encoder, pooling, max_len)
    with loading(folder, key):
        weights = load_file(folder / _DENSE / "model.safetensors")
        own = {name.removeprefix("linear."): value for name, value in weights.items()}
        if len(own["bias"]) != model.classifier.out_features:
            many = f"{len(own['bias'])} labels, the data have {model.classifier.out_features}"
            raise UserError(f"{key}={folder}: was fine-tuned for {many}; name the pretrained model")
        model.classifier.load_state_dict(own)
    return model.eval()
