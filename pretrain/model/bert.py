"""An encoder with a packed forward: Hugging Face's modules and names, one row of real tokens, no padding.

A micro-batch is one row of T tokens with `cu_seqlens`; everything but attention (attention.py) works token by token,
the MLM head sees masked positions only and NSP each sample's own [CLS]. Which modules those are says the architecture
(blueprint.py).
Shapes: T tokens, N samples, M masked tokens, V real vocabulary, R with its padding, C width.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cloze.corpus.manifest import TokenizerFacts
from cloze.errors import UserError
from pretrain.config import Attention, ModelConfig, PositionInit, padded_vocab_size
from pretrain.data.loader import MicroBatch
from pretrain.model.architectures import blueprint_of, by_model_type
from pretrain.model.attention import PACKED_ATTENTION, kernel_with_bias, packing
from pretrain.model.blueprint import Blueprint
from pretrain.model.cpu_dropout import replace_dropout
from pretrain.model.cpu_tied_table import add_rows_in_place
from pretrain.model.last_layer import read_in_part


def sinusoids(num_positions: int, width: int, *, size: float) -> Tensor:
    """Position embeddings to start from, f32 [num_positions, width], whose root mean square is `size`.

    Sines and cosines of wavelengths from 2 pi to 10,000 * 2 pi (Vaswani et al. 2017, section 3.5): near positions are
    alike from the start, which random ones would have to learn.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
    return (waves * size * math.sqrt(2)).float()


class _WithoutPadding(torch.autograd.Function):
    """Logits in which no row counts that only pads the vocabulary. In place: a slice would be copied both ways."""

    @staticmethod
    def forward(ctx: Any, logits_MxR: Tensor, vocab_size: int) -> Tensor:
        ctx.mark_dirty(logits_MxR)
        logits_MxR[:, vocab_size:] = -torch.inf
        return logits_MxR

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # zero there: of exp(-inf)


class PackedBert(nn.Module):
    """Hugging Face's model for pretraining under its own parameter names, with the packed forward."""

    def __init__(
        self, model: ModelConfig, tokenizer: TokenizerFacts, *, max_len: int, kernel: Attention = Attention.sdpa
    ) -> None:
        super().__init__()
        if max_len > model.max_positions:
            raise UserError(
                f"model.max_positions={model.max_positions}: shorter than the corpus' samples of {max_len} tokens; "
                f"set model.max_positions={max_len} or prepare with a smaller max_len"
            )
        rows = padded_vocab_size(tokenizer.vocab_size, model.pad_vocab_to)
        # With the most dropout that will be: ModernBERT has modules for it only where there is some.
        most = replace(model, dropout=model.dropout_curve.peak, attention_dropout=model.attention_dropout_curve.peak)
        blueprint = blueprint_of(model.architecture)
        self._hold(blueprint, blueprint.build(most, tokenizer, rows), tokenizer.vocab_size, kernel)
        if blueprint.positions and model.position_init is PositionInit.sinusoid:
            positions = self.hf.get_parameter(blueprint.positions).data[blueprint.offset(self.hf) :]
            positions.copy_(sinusoids(*positions.shape, size=model.weights_std))
        if model.activation_checkpointing:
            # The older name is all that transformers 5.17 has; newer ones warn of it.
            enable = getattr(self.hf, "activation_checkpointing_enable", self.hf.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    @classmethod
    def of(cls, hf: PreTrainedModel, kernel: Attention) -> "PackedBert":
        """A model that there is already, of the class of an architecture here: it becomes packed."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed._hold(by_model_type()[hf.config.model_type], hf, hf.config.vocab_size, kernel)
        return packed

    def _hold(self, blueprint: Blueprint, hf: PreTrainedModel, vocab_size: int, kernel: Attention) -> None:
        self.kernel = kernel
        self.distance_bias = 0.0  # slope per token, of training's forward passes; the loop sets it
        self.vocab_size, self.vocab_rows = vocab_size, hf.config.vocab_size
        self.blueprint, self.hf = blueprint, hf
        blueprint.share_bias(hf)
        self.hf.set_attn_implementation(PACKED_ATTENTION)
        if kernel is Attention.cpu:
            replace_dropout(self.hf)
            add_rows_in_place(self.hf)
        read_in_part(blueprint.layers(hf), blueprint.last_layer)

    @property
    def has_pairs(self) -> bool:
        """Whether there is a next-sentence head."""
        return self.blueprint.has_pairs

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sample."""
        return self.blueprint.max_positions(self.hf)

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Probabilities in training: on embeddings and hidden states, and on attention weights."""
        for name, module in self.hf.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = attention if name.endswith(self.blueprint.attention_dropout) else hidden
        self.blueprint.set_attention_dropout(self.hf, attention)

    def set_rotary(self, model: ModelConfig) -> None:
        """Turn positions as `model.extra` says, in fp32, whatever the precision of the weights."""
        self.blueprint.set_rotary(self.hf, model)

    def compile_layers(self, **options: Any) -> None:
        """torch.compile each layer in place (names stay); they share their code: one build for training, one for
        evaluation; the last layer is of a kind of its own, ModernBERT's others of three. Shapes are variables.
        """
        for layer in self.blueprint.layers(self.hf):
            layer.compile(dynamic=True, **options)

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(MLM logits [M, V] at masked positions, NSP logits [N, 2] from each sample's own [CLS]).

        In training they are [M, R], as many as the embedding matrix has rows; of rows that only pad it they are -inf.

        Without a next-sentence head its logits are zeros, which weigh nothing.
        """
        slope = self.distance_bias if self.training else 0.0
        kernel = kernel_with_bias(self.kernel) if slope else self.kernel
        packed = packing(kernel, batch, self.blueprint.window(self.hf), slope)
        read_K = self.blueprint.read(batch)
        hidden_KxC = self.blueprint.encode(self.hf, batch, packing=packed, read_K=read_K)
        masked_MxC = hidden_KxC[: len(batch.masked_index_M)]
        mlm_logits_MxR = self._without_padding(self.blueprint.predict(self.hf, masked_MxC))
        return mlm_logits_MxR, self.blueprint.judge_pairs(self.hf, hidden_KxC, batch)

    def _without_padding(self, logits_MxR: Tensor) -> Tensor:
        if not self.training:
            return logits_MxR[:, : self.vocab_size]
        if self.vocab_rows == self.vocab_size:
            return logits_MxR
        out: Tensor = _WithoutPadding.apply(logits_MxR, self.vocab_size)  # type: ignore[no-untyped-call]
        return out

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Fill the parameters from a checkpoint. Raises `UserError` where names or shapes differ."""
        own = dict(self.hf.named_parameters())
        if own.keys() != weights.keys():
            raise UserError(
                f"the checkpoint has other parameters than this model ({min(own.keys() ^ weights.keys())}); "
                "resume with the same model options, or name another run"
            )
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise UserError(
                    f"the checkpoint's {name} is {list(weights[name].shape)}, this model's {list(parameter.shape)}; "
                    "resume with the same model options, or name another run"
                )
            parameter.data.copy_(weights[name])
