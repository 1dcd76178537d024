"""The private operators of torch that Cloze calls, each checked against the schema that it was written for."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cloze.errors import UserError

SEEN_IN = "2.11 to 2.13"
_FLASH_ARGUMENTS = (
    ("query", "Tensor"), ("key", "Tensor"), ("value", "Tensor"), ("cum_seq_q", "Optional[Tensor]"),
    ("cum_seq_k", "Optional[Tensor]"), ("max_q", "int"), ("max_k", "int"), ("dropout_p", "float"),
    ("is_causal", "bool"), ("return_debug_mask", "bool"), ("scale", "Optional[float]"),
    ("window_size_left", "Optional[int]"), ("window_size_right", "Optional[int]"),
)  # fmt: skip


@functools.cache
def check_flash_attention() -> None:
    """Raises `UserError` where `aten::_flash_attention_forward` does not take what `flash_attention` gives it."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    found: Sequence[tuple[str, str]] = ()
    if operator is not None and "default" in operator.overloads():
        schema = operator.default._schema
        found = [(argument.name, str(argument.type)) for argument in schema.arguments]
        more = schema.arguments[len(_FLASH_ARGUMENTS) :]
        if tuple(found[: len(_FLASH_ARGUMENTS)]) == _FLASH_ARGUMENTS and all(one.has_default_value() for one in more):
            return
    raise UserError(
        f"torch {torch.__version__}: its _flash_attention_forward({', '.join(name for name, _ in found)}) is not that "
        f"of {SEEN_IN}; use model.attention=flash or sdpa, or another torch"
    )


def flash_attention(
    qkv_TxHxD: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, scaling: float, dropout: float, reach: int
) -> Tensor:
    """Flash attention (Dao 2023) over segments, [T, H, D]; `reach` tokens to each side, -1 for all.

    It is what torch's public `varlen_attn` calls, with a dropout of 0 and no window.
    """
    out_TxHxD: Tensor
    out_TxHxD, *_ = torch.ops.aten._flash_attention_forward(
        *qkv_TxHxD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, is_causal=False, return_debug_mask=False,
        scale=scaling, window_size_left=reach, window_size_right=reach,
    )  # fmt: skip
    return out_TxHxD
