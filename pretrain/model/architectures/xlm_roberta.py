"""XLM-R (Conneau et al. 2020): RoBERTa's architecture under another name, with a vocabulary for a hundred languages."""

from typing import ClassVar

from transformers import PreTrainedModel, XLMRobertaForMaskedLM

from cloze.corpus.manifest import TokenizerFacts
from pretrain.config import Architecture, ModelConfig
from pretrain.model.architectures.roberta import Roberta


class XlmRoberta(Roberta):
    architecture = Architecture.xlm_roberta
    model_class = XLMRobertaForMaskedLM
    model_types: ClassVar[tuple[str, ...]] = ("xlm-roberta",)

    def build(self, model: ModelConfig, tokenizer: TokenizerFacts, vocab_rows: int) -> PreTrainedModel:
        """With its head behind the encoder, as all others have it: tied weights bear the name of the first."""
        hf = super().build(model, tokenizer, vocab_rows)
        head = hf.lm_head
        del hf.lm_head
        hf.lm_head = head
        return hf


BLUEPRINT = XlmRoberta()
