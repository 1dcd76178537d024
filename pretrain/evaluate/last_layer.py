"""A BERT of which one position a sample is read: its last layer is run for that position alone.

Keys and values of all tokens are needed there, queries and the feed-forward part are not: of four layers, that saves
a fifth. The same result, for scoring; training and evaluation inside a run do without it.
Shapes: T tokens, N samples, L longest sample, M masked positions, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Attention
from pretrain.data.loader import MicroBatch
from pretrain.model.attention import Padded, packing
from pretrain.model.bert import PackedBert


def masked_logits(module: PackedBert) -> Callable[[MicroBatch], Tensor]:
    """(micro-batch with one masked position a sample) -> MLM logits [N, V]. Changes the last layer of a BERT for good.

    ModernBERT is run whole.
    """
    if not module.has_pairs:
        return lambda batch: module(batch)[0]
    layers = module.hf.bert.encoder.layer
    layers[-1] = _LastLayer(layers[-1])

    def logits(batch: MicroBatch) -> Tensor:
        masked_NxC = module.hf.bert(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            token_type_ids=batch.token_type_ids_T[None],
            packing=packing(Attention.sdpa, batch),
            masked_index_N=batch.masked_index_M[: batch.num_masked],
        ).last_hidden_state[0]
        found: Tensor = module.hf.cls.predictions(masked_NxC)
        return found

    return logits


class _LastLayer(nn.Module):
    """Hugging Face's `BertLayer` [1, T, C] -> [1, N, C], of the masked positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, hidden_1xTxC: Tensor, *_: Any, packing: Padded, masked_index_N: Tensor, **__: Any) -> Tensor:
        attention, rows = self.layer.attention.self, packing.num_samples
        hidden_TxC = hidden_1xTxC[0]
        masked_NxC = hidden_TxC.index_select(0, masked_index_N)

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, -1, attention.num_attention_heads, attention.attention_head_size).transpose(1, 2)

        context_NxHx1xD = F.scaled_dot_product_attention(
            heads(attention.query(masked_NxC)),
            heads(attention.key(hidden_TxC).index_select(0, packing.gather_NL)),
            heads(attention.value(hidden_TxC).index_select(0, packing.gather_NL)),
            attn_mask=packing.mask_Nx1x1xL,
        )
        context_NxC = context_NxHx1xD.transpose(1, 2).reshape(rows, -1)
        attended_NxC = self.layer.attention.output(context_NxC, masked_NxC)
        out_NxC: Tensor = self.layer.output(self.layer.intermediate(attended_NxC), attended_NxC)
        return out_NxC[None]
