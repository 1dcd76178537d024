"""What Cloze knows of an architecture: how Hugging Face's model of it is made, and where its parts are in that.

Each architecture is one `Blueprint`, in a module of its own in architectures/. It holds no weights: `hf` is always
Hugging Face's module. Everything else that is told of a model here is true of all of them.
Shapes: T tokens, K of them that are read, N samples, M masked tokens, R rows of the vocabulary, C width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from cloze.corpus.manifest import TokenizerFacts
from cloze.errors import UserError
from pretrain.config import Architecture, ModelConfig
from pretrain.data.loader import MicroBatch

_SIZES = {  # keys of `model` -> Hugging Face's
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}


class Blueprint(ABC):
    """One architecture."""

    architecture: ClassVar[Architecture]
    model_class: ClassVar[Any]  # Hugging Face's, with its heads for pretraining
    model_types: ClassVar[tuple[str, ...]]  # of a config.json whose weights fit; the first is the model's own
    auto_class: ClassVar[Any] = AutoModelForMaskedLM  # that loads it
    takes_token_types: ClassVar[bool] = False  # whether its tokenizer returns them
    extra: ClassVar[Mapping[str, Any]]  # what `model.extra` may change in Hugging Face's configuration, as published
    fixed: ClassVar[Mapping[str, Any]] = {"is_decoder": False, "add_cross_attention": False}  # where a config.json says
    encoder_parts: ClassVar[tuple[str, ...]]  # how names begin in a file of the encoder alone
    last_layer: ClassVar[type[nn.Module]]  # mixed into its last layer: what of last_layer.py fits
    attention_dropout: ClassVar[str]  # how the names of the dropout modules on attention weights end
    positions: ClassVar[str | None] = None  # parameter with the table of positions
    heads: ClassVar[tuple[str, ...]]  # how names of the parts begin that an encoder may lack
    tied: ClassVar[tuple[str, str]]  # weights of the masked-LM head, and the embeddings that they mostly are
    same_bias: ClassVar[Mapping[str, str]] = {}  # second name of the head's bias -> the one in checkpoints

    # Making one

    @abstractmethod
    def own_keys(self, model: ModelConfig, tokenizer: TokenizerFacts) -> dict[str, Any]:
        """What only this architecture's configuration has: dropout, ids of special tokens."""

    def position_offset(self, pad_id: int) -> int:
        """Rows of the table of positions before that of a sample's first token."""
        del pad_id
        return 0

    def config(self, model: ModelConfig, tokenizer: TokenizerFacts, vocab_rows: int) -> PreTrainedConfig:
        """Hugging Face's configuration. Of a curve of dropout it has the last value.

        Raises `UserError` where `model.extra` holds what this architecture has not.
        """
        given = model.extra or {}
        if unknown := sorted(given.keys() - self.extra.keys()):
            raise UserError(
                f"model.extra: {self.architecture.value} has no {unknown[0]}; there are {', '.join(self.extra)}"
            )
        keys = {
            **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
            "vocab_size": vocab_rows,
            "max_position_embeddings": model.max_positions + self.position_offset(tokenizer.pad_id),
            "pad_token_id": tokenizer.pad_id,
            "initializer_range": model.weights_std,
            **self.own_keys(model, tokenizer),
        }
        return self.read_config({**keys, **self.extra, **given}, "model.extra")

    def read_config(self, keys: Mapping[str, Any], where: str) -> PreTrainedConfig:
        """Hugging Face's configuration of what a config.json holds. Raises `UserError` with `where`."""
        for key, value in self.fixed.items():
            if keys.get(key, value) != value:
                raise UserError(
                    f"{where}: its {key} is {keys[key]}; of {self.architecture.value} only {value} is known"
                )
        try:
            return self.model_class.config_class(**keys)
        except Exception as error:  # of whatever kind: a config.json is anybody's
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: no configuration of {self.architecture.value} ({reason:.200})") from error

    def build(self, model: ModelConfig, tokenizer: TokenizerFacts, vocab_rows: int) -> PreTrainedModel:
        """Hugging Face's own module, fresh, with `vocab_rows` rows in the embedding matrix."""
        return self.model_class(self.config(model, tokenizer, vocab_rows))

    def describe(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The keys of `model` that decide which function some weights are, as a configuration has them."""
        sizes = {ours: getattr(config, theirs) for ours, theirs in _SIZES.items()}
        return {"architecture": self.architecture.value, **sizes, "extra": self.described_extra(config)}

    def described_extra(self, config: PreTrainedConfig) -> dict[str, Any]:
        """All of `extra`, as a configuration has it."""
        return {key: getattr(config, key) for key in self.extra}

    def unlike_published(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """The `model.extra` of what `describe` gave."""
        return {key: described["extra"][key] for key, value in self.extra.items() if described["extra"][key] != value}

    # Its parts

    @abstractmethod
    def layers(self, hf: Any) -> nn.ModuleList:
        """Those of the encoder."""

    def read(self, batch: MicroBatch) -> Tensor:
        """The tokens whose hidden states something reads, i64 [K]: those that are masked come first."""
        return batch.masked_index_M

    @abstractmethod
    def encode(self, hf: Any, batch: MicroBatch, **options: Any) -> Tensor:
        """Hidden states of a packed row, [T, C], or [K, C] of those that the option `read_K` names.

        `options` reach every layer: `packing` must be there.
        """

    @abstractmethod
    def predict(self, hf: Any, hidden_MxC: Tensor) -> Tensor:
        """MLM logits [M, R]."""

    has_pairs: ClassVar[bool] = False

    def judge_pairs(self, hf: Any, hidden_KxC: Tensor, batch: MicroBatch) -> Tensor:
        """NSP logits [N, 2] of what was `read`; zeros, which weigh nothing, where there is no such head."""
        del hf
        return hidden_KxC.new_zeros(len(batch.nsp_labels_N), 2)

    def window(self, hf: Any) -> int | None:
        """Tokens to each side, itself counted, that local layers see; None where all see everything."""
        del hf
        return None

    def set_attention_dropout(self, hf: Any, probability: float) -> None:
        """Where it is a number, not a module."""
        del hf, probability

    def set_rotary(self, hf: Any, model: ModelConfig) -> None:
        """Turn positions as `model.extra` says, where they turn."""
        del hf, model

    # True of all

    def offset(self, hf: Any) -> int:
        """`position_offset` of a module."""
        return self.position_offset(hf.config.pad_token_id or 0)

    def max_positions(self, hf: Any) -> int:
        """Tokens of the longest sample."""
        return int(hf.config.max_position_embeddings) - self.offset(hf)

    def vocabulary_rows(self, hf: Any) -> frozenset[str]:
        """Parameters with a row per token: only these are padded."""
        head = hf.get_output_embeddings()
        found = {id(hf.get_input_embeddings().weight), id(head.weight), id(head.bias)}
        return frozenset(name for name, p in hf.named_parameters() if id(p) in found or name in self.same_bias.values())

    def share_bias(self, hf: Any) -> None:
        """Hugging Face gives the head two biases, and where its weights are not tied uses the second alone."""
        for second, first in self.same_bias.items():
            head, bias = hf.get_submodule(second.rpartition(".")[0]), hf.get_parameter(first)
            if head.bias is not bias:
                bias.data.copy_(head.bias.data)
                head.bias = bias
