"""RoBERTa (Liu et al. 2019): a BERT without pairs, whose positions begin behind the padding's.

A table of 514 holds 512 tokens, since [PAD] is 1: fairseq's embedding of positions counts from there.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForMaskedLM, RobertaForMaskedLM

from cloze.corpus.manifest import TokenizerFacts
from pretrain.config import Architecture, ModelConfig
from pretrain.data.loader import MicroBatch
from pretrain.model.architectures.bert import Bert
from pretrain.model.blueprint import Blueprint


class Roberta(Bert):
    architecture = Architecture.roberta
    model_class = RobertaForMaskedLM
    model_types: ClassVar[tuple[str, ...]] = ("roberta", "camembert")
    auto_class = AutoModelForMaskedLM
    takes_token_types = False
    extra: ClassVar[Mapping[str, Any]] = {**Bert.extra, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
    positions = "roberta.embeddings.position_embeddings.weight"
    heads: ClassVar[tuple[str, ...]] = ("lm_head",)
    tied = ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    same_bias: ClassVar[Mapping[str, str]] = {"lm_head.decoder.bias": "lm_head.bias"}
    has_pairs = False
    read = Blueprint.read
    judge_pairs = Blueprint.judge_pairs

    def own_keys(self, model: ModelConfig, tokenizer: TokenizerFacts) -> dict[str, Any]:
        return {
            **super().own_keys(model, tokenizer),
            "bos_token_id": tokenizer.cls_id,
            "eos_token_id": tokenizer.sep_id,
        }

    def position_offset(self, pad_id: int) -> int:
        return pad_id + 1

    def encode(self, hf: Any, batch: MicroBatch, **options: Any) -> Tensor:
        """All tokens are of the first type, whatever the batch says: published models have no other."""
        hidden_TxC: Tensor = hf.base_model(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None] + self.offset(hf),
            token_type_ids=batch.token_type_ids_T.new_zeros(1, len(batch.token_type_ids_T)),
            **options,
        ).last_hidden_state[0]
        return hidden_TxC

    def predict(self, hf: Any, hidden_MxC: Tensor) -> Tensor:
        logits_MxR: Tensor = hf.lm_head(hidden_MxC)
        return logits_MxR


BLUEPRINT = Roberta()
