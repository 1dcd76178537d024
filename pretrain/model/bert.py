"""BERT and ModernBERT with a packed forward: Hugging Face's modules and names, one row of real tokens, no padding.

A micro-batch is one row of T tokens with `cu_seqlens`; everything but attention (attention.py) works token by token,
the MLM head sees masked positions only and NSP each sample's own [CLS].
Shapes: T tokens, N samples, M masked tokens, V real vocabulary, R with its padding, C width.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel

from cloze.corpus.manifest import TokenizerFacts
from cloze.errors import UserError
from pretrain.config import Architecture, Attention, ModelConfig, PositionInit, padded_vocab_size
from pretrain.data.loader import MicroBatch
from pretrain.model.attention import PACKED_ATTENTION, kernel_with_bias, packing
from pretrain.model.cpu_dropout import replace_dropout
from pretrain.model.last_layer import read_in_part

VOCABULARY_ROWS = frozenset(  # parameters with a row per token, of either architecture: only these are padded
    {
        "bert.embeddings.word_embeddings.weight", "cls.predictions.bias",
        "model.embeddings.tok_embeddings.weight", "decoder.bias",
    }
)  # fmt: skip


def hugging_face_model(model: ModelConfig, tokenizer: TokenizerFacts, *, vocab_rows: int) -> PreTrainedModel:
    """Hugging Face's own module of this model, fresh, with `vocab_rows` rows in the embedding matrix.

    Of a curve of dropout it has the last value.
    """
    dropout, attention_dropout = model.dropout_curve.at(1.0), model.attention_dropout_curve.at(1.0)
    common = {
        "vocab_size": vocab_rows,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_positions,
        "pad_token_id": tokenizer.pad_id,
        "initializer_range": model.weights_std,
    }
    if model.architecture is Architecture.modernbert:
        return ModernBertForMaskedLM(
            ModernBertConfig(
                **common,
                embedding_dropout=dropout,
                mlp_dropout=dropout,
                attention_dropout=attention_dropout,
                bos_token_id=tokenizer.cls_id,
                eos_token_id=tokenizer.sep_id,
                cls_token_id=tokenizer.cls_id,
                sep_token_id=tokenizer.sep_id,
            )
        )
    return BertForPreTraining(
        BertConfig(
            **common,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=attention_dropout,
            layer_norm_eps=1e-12,
        )
    )


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
    """`BertForPreTraining` or `ModernBertForMaskedLM` under its own parameter names, with the packed forward."""

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
        self._hold(hugging_face_model(most, tokenizer, vocab_rows=rows), tokenizer.vocab_size, kernel)
        if self.has_pairs and model.position_init is PositionInit.sinusoid:
            positions = self.hf.bert.embeddings.position_embeddings.weight
            positions.data.copy_(sinusoids(*positions.shape, size=model.weights_std))
        if model.activation_checkpointing:
            # The older name is all that transformers 5.17 has; newer ones warn of it.
            enable = getattr(self.hf, "activation_checkpointing_enable", self.hf.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    @classmethod
    def of(cls, hf: PreTrainedModel, kernel: Attention) -> "PackedBert":
        """A model that there is already, a `BertForPreTraining` or a `ModernBertForMaskedLM`: it becomes packed."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed._hold(hf, hf.config.vocab_size, kernel)
        return packed

    def _hold(self, hf: PreTrainedModel, vocab_size: int, kernel: Attention) -> None:
        self.kernel = kernel
        self.distance_bias = 0.0  # slope per token, of training's forward passes; the loop sets it
        self.vocab_size, self.vocab_rows = vocab_size, hf.config.vocab_size
        self.hf = hf
        self.hf.set_attn_implementation(PACKED_ATTENTION)
        if kernel is Attention.cpu:
            replace_dropout(self.hf)
        self.has_pairs = hf.config.model_type == Architecture.bert.value
        read_in_part(self._layers)

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Probabilities in training: on embeddings and hidden states, and on attention weights."""
        for name, module in self.hf.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = attention if name.endswith(("attention.self.dropout", "attn.out_drop")) else hidden
            elif not self.has_pairs and name.endswith(".attn"):
                module.attention_dropout = attention

    def compile_layers(self, **options: Any) -> None:
        """torch.compile each layer in place (names stay); they share their code: one build for training, one for
        evaluation; the last layer is of a kind of its own, ModernBERT's others of three. Shapes are variables.
        """
        for layer in self._layers:
            layer.compile(dynamic=True, **options)

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.hf.bert.encoder.layer if self.has_pairs else self.hf.model.layers
        return layers

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(MLM logits [M, V] at masked positions, NSP logits [N, 2] from each sample's own [CLS]).

        In training they are [M, R], as many as the embedding matrix has rows; of rows that only pad it they are -inf.

        ModernBERT has no pairs: its NSP logits are zeros, which weigh nothing.
        """
        inputs = {"input_ids": batch.input_ids_T[None], "position_ids": batch.position_ids_T[None]}
        slope = self.distance_bias if self.training else 0.0
        kernel = kernel_with_bias(self.kernel) if slope else self.kernel
        if not self.has_pairs:
            packed = packing(kernel, batch, self.hf.config.sliding_window + 1, slope)
            read = self.hf.model(**inputs, packing=packed, read_K=batch.masked_index_M).last_hidden_state
            mlm_logits_MxR = self._without_padding(self.hf.decoder(self.hf.head(read[0])))
            return mlm_logits_MxR, mlm_logits_MxR.new_zeros(len(batch.nsp_labels_N), 2)
        read = self.hf.bert(
            **inputs,
            token_type_ids=batch.token_type_ids_T[None],
            packing=packing(kernel, batch, slope=slope),
            read_K=torch.cat([batch.masked_index_M, batch.cu_seqlens[:-1].long()]),
        ).last_hidden_state
        masked_MxC, cls_NxC = read[0].split([len(batch.masked_index_M), len(batch.nsp_labels_N)])
        mlm_logits_MxR = self._without_padding(self.hf.cls.predictions(masked_MxC))
        return mlm_logits_MxR, self.hf.cls.seq_relationship(self.hf.bert.pooler(cls_NxC[:, None]))

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
