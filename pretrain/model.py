"""BERT with a packed forward: Hugging Face's modules and names, one row of real tokens, no padding.

A micro-batch is one row of T tokens with `cu_seqlens`; everything but attention works token by token, attention is
bound to each sample, the MLM head sees masked positions only and NSP each sample's own [CLS].
Shapes: T tokens, N samples, L longest sample, M masked tokens, H heads, D head width, V real vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertForPreTraining

from data_prep.errors import UserError
from data_prep.manifest import TokenizerFacts
from pretrain.config import ModelConfig
from pretrain.loader import MicroBatch

_ATTENTION = "cloze_packed"


class Padding(NamedTuple):
    """How T packed tokens sit in N padded rows of L: for attention kernels that want a rectangle."""

    gather_NL: Tensor  # i64: for each cell the packed token (padding repeats token 0)
    scatter_T: Tensor  # i64: for each packed token its cell
    mask_Nx1x1xL: Tensor  # bool: True at real tokens
    num_samples: int


def padding(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> Padding:
    starts_N, lengths_N = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    columns_L = torch.arange(max_seqlen, device=cu_seqlens.device)
    mask_NxL = columns_L < lengths_N[:, None]
    gather_NxL = torch.where(mask_NxL, starts_N[:, None] + columns_L, 0)
    tokens_T = torch.arange(num_tokens, device=cu_seqlens.device)
    samples_T = torch.bucketize(tokens_T, cu_seqlens[1:].long(), right=True)
    inside_T = samples_T < len(lengths_N)  # the others belong to no sample: any cell will do, nothing reads them
    samples_T = torch.where(inside_T, samples_T, 0)
    scatter_T = torch.where(inside_T, samples_T * max_seqlen + tokens_T - starts_N[samples_T], 0)
    return Padding(gather_NxL.reshape(-1), scatter_T, mask_NxL[:, None, None, :], len(lengths_N))


def packed_attention(
    module: nn.Module,
    query_1xHxTxD: Tensor,
    key_1xHxTxD: Tensor,
    value_1xHxTxD: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_padding: Padding,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each packed sample: q, k and v are padded here and only here. Returns [1, T, H, D]."""
    del module, attention_mask
    _1, heads, num_tokens, width = query_1xHxTxD.shape
    num_samples, max_seqlen = packed_padding.num_samples, packed_padding.mask_Nx1x1xL.shape[-1]

    def pad(x_1xHxTxD: Tensor) -> Tensor:
        flat_TxHD = x_1xHxTxD.transpose(1, 2).reshape(num_tokens, heads * width)
        rows = flat_TxHD.index_select(0, packed_padding.gather_NL)
        return rows.view(num_samples, max_seqlen, heads, width).transpose(1, 2)

    out_NxHxLxD = F.scaled_dot_product_attention(
        pad(query_1xHxTxD),
        pad(key_1xHxTxD),
        pad(value_1xHxTxD),
        attn_mask=packed_padding.mask_Nx1x1xL,
        dropout_p=dropout,
        scale=scaling,
    )
    flat_NLxHD = out_NxHxLxD.transpose(1, 2).reshape(num_samples * max_seqlen, heads * width)
    out_TxHD = flat_NLxHD.index_select(0, packed_padding.scatter_T)
    return out_TxHD.view(1, num_tokens, heads, width), None


AttentionInterface.register(_ATTENTION, packed_attention)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    return -(-vocab_size // multiple) * multiple


def bert_config(model: ModelConfig, tokenizer: TokenizerFacts, *, vocab_rows: int) -> BertConfig:
    """Hugging Face's configuration of this model with `vocab_rows` rows in the embedding matrix."""
    return BertConfig(
        vocab_size=vocab_rows,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_positions,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        pad_token_id=tokenizer.pad_id,
        layer_norm_eps=1e-12,
        initializer_range=0.02,
    )


class PackedBert(nn.Module):
    """`BertForPreTraining` under its own parameter names, with the packed forward."""

    def __init__(self, model: ModelConfig, tokenizer: TokenizerFacts, *, max_len: int) -> None:
        super().__init__()
        if max_len > model.max_positions:
            raise UserError(
                f"model.max_positions={model.max_positions}: shorter than the corpus' samples of {max_len} tokens; "
                f"set model.max_positions={max_len} or prepare with a smaller max_len"
            )
        self.vocab_size = tokenizer.vocab_size
        self.vocab_rows = padded_vocab_size(tokenizer.vocab_size, model.pad_vocab_to)
        self.hf = BertForPreTraining(bert_config(model, tokenizer, vocab_rows=self.vocab_rows))
        self.hf.set_attn_implementation(_ATTENTION)
        if model.activation_checkpointing:
            # The older name is all that transformers 5.17 has; newer ones warn of it.
            enable = getattr(self.hf, "activation_checkpointing_enable", self.hf.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(MLM logits [M, V] at masked positions, NSP logits [N, 2] from each sample's own [CLS])."""
        hidden_1xTxC = self.hf.bert(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            token_type_ids=batch.token_type_ids_T[None],
            packed_padding=padding(batch.cu_seqlens, len(batch.input_ids_T), batch.max_seqlen),
        ).last_hidden_state
        masked_MxC = hidden_1xTxC[0].index_select(0, batch.masked_index_M)
        mlm_logits_MxV = self.hf.cls.predictions(masked_MxC)[:, : self.vocab_size]
        cls_NxC = hidden_1xTxC[0].index_select(0, batch.cu_seqlens[:-1].long())
        return mlm_logits_MxV, self.hf.cls.seq_relationship(self.hf.bert.pooler(cls_NxC[:, None]))

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
