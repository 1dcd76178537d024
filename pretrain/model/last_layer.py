"""The last layer of an encoder, run to its end only for tokens that something reads: masked ones and each [CLS].

Every token's keys and values are needed there; what follows attention is not. With 15% masked that leaves out four
fifths of the last layer's feed-forward part and output projection (ModernBERT: of its feed-forward part), which is a
third of a tiny BERT's encoder and 5% of a base one's, forward and backward. The result is the same, and so are names.
Shapes: T tokens, K tokens that are read, C width.
"""

from typing import Any

from torch import Tensor, nn


class LastPostNormLayer(nn.Module):
    """Before a layer like `BertLayer` [1, T, C] -> [1, K, C] of the tokens `read_K` (i64), or of all without that."""

    attention: Any
    feed_forward_chunk: Any

    def forward(self, hidden_1xTxC: Tensor, *args: Any, read_K: Tensor | None = None, **kwargs: Any) -> Tensor:
        if read_K is None:
            whole: Tensor = super().forward(hidden_1xTxC, *args, **kwargs)
            return whole
        context_1xTxC, _ = self.attention.self(hidden_1xTxC, **kwargs)
        read = context_1xTxC.index_select(1, read_K), hidden_1xTxC.index_select(1, read_K)
        out_1xKxC: Tensor = self.feed_forward_chunk(self.attention.output(*read))
        return out_1xKxC


class LastPreNormLayer(nn.Module):
    """Before a layer like `ModernBertEncoderLayer`, likewise."""

    attn: Any
    attn_norm: Any
    mlp: Any
    mlp_norm: Any

    def forward(self, hidden_1xTxC: Tensor, *args: Any, read_K: Tensor | None = None, **kwargs: Any) -> Tensor:
        if read_K is None:
            whole: Tensor = super().forward(hidden_1xTxC, *args, **kwargs)
            return whole
        attended_1xTxC, _ = self.attn(self.attn_norm(hidden_1xTxC), **kwargs)
        sum_1xKxC = hidden_1xTxC.index_select(1, read_K) + attended_1xTxC.index_select(1, read_K)
        out_1xKxC: Tensor = sum_1xKxC + self.mlp(self.mlp_norm(sum_1xKxC))
        return out_1xKxC


def read_in_part(layers: nn.ModuleList, last: type[nn.Module]) -> None:
    """Let the last of these layers know `read_K`, by one of the classes above."""
    layer = type(layers[-1])
    layers[-1].__class__ = type(f"Last{layer.__name__}", (last, layer), {})  # parameters, hooks and names stay
