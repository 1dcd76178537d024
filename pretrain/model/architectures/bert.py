"""BERT (Devlin et al. 2019): learned positions, two token types, heads for masked words and for pairs."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForPreTraining, BertForPreTraining

from cloze.corpus.manifest import TokenizerFacts
from pretrain.config import Architecture, ModelConfig
from pretrain.data.loader import MicroBatch
from pretrain.model.blueprint import Blueprint
from pretrain.model.last_layer import LastPostNormLayer


class Bert(Blueprint):
    architecture = Architecture.bert
    model_class = BertForPreTraining
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    auto_class = AutoModelForPreTraining
    takes_token_types = True
    extra: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
    }
    fixed: ClassVar[Mapping[str, Any]] = {**Blueprint.fixed, "position_embedding_type": "absolute"}
    encoder_parts: ClassVar[tuple[str, ...]] = ("embeddings.", "encoder.", "pooler.")
    last_layer = LastPostNormLayer
    attention_dropout = "attention.self.dropout"
    positions = "bert.embeddings.position_embeddings.weight"
    heads: ClassVar[tuple[str, ...]] = ("cls.predictions", "cls.seq_relationship", "bert.pooler")
    tied = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    same_bias: ClassVar[Mapping[str, str]] = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    has_pairs = True

    def own_keys(self, model: ModelConfig, tokenizer: TokenizerFacts) -> dict[str, Any]:
        del tokenizer
        return {
            "hidden_dropout_prob": model.dropout_curve.at(1.0),
            "attention_probs_dropout_prob": model.attention_dropout_curve.at(1.0),
        }

    def layers(self, hf: Any) -> nn.ModuleList:
        found: nn.ModuleList = hf.base_model.encoder.layer
        return found

    def read(self, batch: MicroBatch) -> Tensor:
        """Each [CLS], too, for the pairs."""
        return torch.cat([batch.masked_index_M, batch.cu_seqlens[:-1].long()])

    def encode(self, hf: Any, batch: MicroBatch, **options: Any) -> Tensor:
        hidden_TxC: Tensor = hf.base_model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            token_type_ids=batch.token_type_ids_T[None],
            **options,
        ).last_hidden_state[0]
        return hidden_TxC

    def predict(self, hf: Any, hidden_MxC: Tensor) -> Tensor:
        logits_MxR: Tensor = hf.cls.predictions(hidden_MxC)
        return logits_MxR

    def judge_pairs(self, hf: Any, hidden_KxC: Tensor, batch: MicroBatch) -> Tensor:
        cls_NxC = hidden_KxC[len(batch.masked_index_M) :]
        logits_Nx2: Tensor = hf.cls.seq_relationship(hf.base_model.pooler(cls_NxC[:, None]))
        return logits_Nx2


BLUEPRINT = Bert()
