"""Attention inside each sample of a packed row, by one of five kernels that give the same result.

`sdpa` pads q, k and v to a rectangle: the reference, and the one for fp32 on GPUs. `varlen` (torch's) and `flash` (the
flash-attn package) take the row as it is; `flex` compiles a block mask; `cpu` (cpu_attention.py) goes from sample to
sample. All but `flex` know dropout. All but `varlen`, whose gradient knows nothing of it, know a distance bias: scores
minus slope times distance in tokens (ALiBi's form, Press et al. 2022, section 3), with one slope for all heads. It is
of training only, and annealed away (docs/training.md): evaluation and export never have it.
Shapes: T tokens of a row, N samples, L longest sample, H heads, D head width, B blocks of a row.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from cloze.errors import UserError
from pretrain.config import Attention, ModelConfig, Precision
from pretrain.data.loader import TOKENS_MULTIPLE, MicroBatch
from pretrain.model import cpu_attention, torch_private
from pretrain.model.cpu_attention import Options, SampleBounds

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

PACKED_ATTENTION = "cloze_packed"  # under this name Hugging Face's modules find `packed_attention`
_FLASH_CAPABILITY = (8, 0)  # Ampere: the first that torch's and flash-attn's kernels run on
_BLOCK = 128


class Padded(NamedTuple):
    """How T packed tokens sit in N padded rows of L."""

    gather_NL: Tensor  # i64: for each cell the packed token (padding repeats token 0)
    scatter_T: Tensor  # i64: for each packed token its cell
    mask_Nx1x1xL: Tensor  # bool: True at real tokens
    num_samples: int
    slope: Tensor | None  # f32, of the distance bias


class Segments(NamedTuple):
    """The row as segments: one per sample, and empty or filling ones that cover the padding at its end."""

    cu_seqlens: Tensor  # i32, from 0 to T
    max_seqlen: int
    flash: bool  # by flash-attn, not by torch
    slope: Tensor | None  # f32, of the distance bias: flash-attn's alone


class Blocks(NamedTuple):
    """Block masks of the row."""

    full: BlockMask
    local: BlockMask | None  # for layers with a sliding window
    slope: Tensor | None  # f32, of the distance bias


Packing = Padded | Segments | Blocks | SampleBounds


def choose_kernel(model: ModelConfig, precision: Precision, capability: tuple[int, int] | None) -> Attention:
    """What `model.attention` comes to on a GPU of this compute capability, or on a CPU (None).

    Raises `UserError` where it cannot run there, or torch is another than it was written for.
    """
    wanted = model.attention
    if wanted is Attention.auto:
        if capability is None:
            return Attention.cpu
        wanted = Attention.sdpa if _obstacle(Attention.varlen, model, precision, capability) else Attention.varlen
    elif obstacle := _obstacle(wanted, model, precision, capability):
        raise UserError(f"model.attention={wanted.value}: {obstacle}; use model.attention=auto")
    if wanted is Attention.varlen:
        torch_private.check_flash_attention()
    return wanted


def _obstacle(kernel: Attention, model: ModelConfig, precision: Precision, capability: tuple[int, int] | None) -> str:
    """Why a kernel cannot run, or nothing."""
    width = model.hidden_size // model.num_heads
    match kernel:
        case Attention.sdpa:
            return ""
        case Attention.cpu:
            return "the model is on a GPU" if capability else ""
        case _ if capability is None:
            return "needs a GPU"
        case Attention.flex:
            return "" if width >= 16 else f"needs heads at least 16 wide, not {width}"
        case Attention.flash if flash_attn_varlen_func is None:
            return "flash-attn is not installed"
    if capability < _FLASH_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or newer (Ampere)"
    if precision is Precision.fp32:
        return "has no fp32; needs precision=bf16 or fp16"
    return "" if width % 8 == 0 and width <= 256 else f"needs heads of a multiple of 8 up to 256 wide, not {width}"


def kernel_with_bias(kernel: Attention) -> Attention:
    """The kernel to train with while there is a distance bias: `kernel`, unless its gradient would not know of it.

    torch's variable-length operator takes slopes forward, and its derivative leaves them out.
    """
    if kernel is not Attention.varlen:
        return kernel
    return Attention.sdpa if flash_attn_varlen_func is None else Attention.flash


def packing(kernel: Attention, batch: MicroBatch, window: int | None = None, slope: float = 0.0) -> Packing:
    """What `kernel` must know of a micro-batch; once per forward pass, for all layers. Never waits for a GPU.

    `slope` is the distance bias, per token.
    """
    assert not (slope and kernel is Attention.varlen), "see kernel_with_bias"
    num_tokens = len(batch.input_ids_T)
    if kernel is Attention.cpu:
        return SampleBounds(batch.cu_seqlens.tolist(), batch.max_seqlen, slope)
    # A tensor: another number at each step would be another build of a compiled kernel.
    bias = torch.full((), slope, dtype=torch.float32, device=batch.cu_seqlens.device) if slope else None
    if kernel is Attention.sdpa:
        return _padded(batch.cu_seqlens, num_tokens, batch.max_seqlen, bias)
    if kernel is Attention.flex:
        blocks = _block_mask(batch.cu_seqlens, num_tokens, None)
        return Blocks(blocks, None if window is None else _block_mask(batch.cu_seqlens, num_tokens, window), bias)
    # The tokens that fill up the row (see `bounded`) get segments of their own, none longer than a sample.
    extra = torch.arange(1, -(-TOKENS_MULTIPLE // batch.max_seqlen) + 1, device=batch.cu_seqlens.device)
    ends = (batch.cu_seqlens[-1] + extra * batch.max_seqlen).clamp(max=num_tokens)
    cu_seqlens = torch.cat([batch.cu_seqlens, ends.to(torch.int32)])
    return Segments(cu_seqlens, batch.max_seqlen, kernel is Attention.flash, bias)


def packed_attention(
    module: nn.Module,
    query_1xHxTxD: Tensor,
    key_1xHxTxD: Tensor,
    value_1xHxTxD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every token to its own sample's, [1, T, H, D]; where `sliding_window` is w, to those nearer than w.

    Called by Hugging Face's attention modules, which hand `packing` through beside `scaling`, `dropout` [0] and
    `sliding_window` [none].
    """
    del module, attention_mask
    packing: Packing = kwargs["packing"]
    qkv = query_1xHxTxD, key_1xHxTxD, value_1xHxTxD
    options = Options(kwargs["scaling"], kwargs.get("dropout", 0.0), kwargs.get("sliding_window"))
    if isinstance(packing, Padded):
        out_TxHxD = _sdpa(*qkv, packing, options)
    elif isinstance(packing, SampleBounds):
        out_TxHxD = cpu_attention.attend(*(x.squeeze(0) for x in qkv), packing, options).transpose(0, 1)
    elif isinstance(packing, Segments):
        out_TxHxD = _varlen(*qkv, packing, options)
    else:
        assert not options.dropout
        mask = packing.full if options.window is None else packing.local
        attend = _plain_flex if torch.compiler.is_compiling() else _compiled_flex()
        out_TxHxD = attend(*qkv, mask, packing.slope, options.scaling)[0].transpose(0, 1)
    return out_TxHxD.unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _sdpa(
    query_1xHxTxD: Tensor, key_1xHxTxD: Tensor, value_1xHxTxD: Tensor, padded: Padded, options: Options
) -> Tensor:
    """q, k and v are padded here and only here. Returns [T, H, D]."""
    _1, heads, num_tokens, width = query_1xHxTxD.shape
    num_samples, max_seqlen = padded.num_samples, padded.mask_Nx1x1xL.shape[-1]

    def pad(x_1xHxTxD: Tensor) -> Tensor:
        flat_TxHD = x_1xHxTxD.transpose(1, 2).reshape(num_tokens, heads * width)
        rows = flat_TxHD.index_select(0, padded.gather_NL)
        return rows.view(num_samples, max_seqlen, heads, width).transpose(1, 2)

    mask = padded.mask_Nx1x1xL
    if options.window is not None or padded.slope is not None:
        columns_L = torch.arange(max_seqlen, device=mask.device)
        distance_LxL = (columns_L[:, None] - columns_L).abs()
        near_LxL = distance_LxL == 0  # no row without a key, padding's neither
        mask = mask | near_LxL if options.window is None else (mask & (distance_LxL < options.window)) | near_LxL
        if padded.slope is not None:
            bias_LxL = (distance_LxL * -padded.slope).to(query_1xHxTxD.dtype)
            mask = torch.where(mask, bias_LxL, -torch.inf)
    out_NxHxLxD = F.scaled_dot_product_attention(
        pad(query_1xHxTxD),
        pad(key_1xHxTxD),
        pad(value_1xHxTxD),
        attn_mask=mask,
        dropout_p=options.dropout,
        scale=options.scaling,
    )
    flat_NLxHD = out_NxHxLxD.transpose(1, 2).reshape(num_samples * max_seqlen, heads * width)
    return flat_NLxHD.index_select(0, padded.scatter_T).view(num_tokens, heads, width)


def _padded(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, slope: Tensor | None) -> Padded:
    starts_N, lengths_N = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    columns_L = torch.arange(max_seqlen, device=cu_seqlens.device)
    mask_NxL = columns_L < lengths_N[:, None]
    gather_NxL = torch.where(mask_NxL, starts_N[:, None] + columns_L, 0)
    samples_T = samples_of_tokens(cu_seqlens, num_tokens)
    tokens_T = torch.arange(num_tokens, device=cu_seqlens.device)
    inside_T = samples_T < len(lengths_N)  # the others belong to no sample: any cell will do, nothing reads them
    samples_T = torch.where(inside_T, samples_T, 0)
    scatter_T = torch.where(inside_T, samples_T * max_seqlen + tokens_T - starts_N[samples_T], 0)
    return Padded(gather_NxL.reshape(-1), scatter_T, mask_NxL[:, None, None, :], len(lengths_N), slope)


def samples_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Each token's sample, i64 [T]; N for those that fill up the row."""
    tokens_T = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.bucketize(tokens_T, cu_seqlens[1:].long(), right=True)


def _varlen(
    query_1xHxTxD: Tensor, key_1xHxTxD: Tensor, value_1xHxTxD: Tensor, segments: Segments, options: Options
) -> Tensor:
    """Flash attention (Dao 2023) over segments. Returns [T, H, D]."""
    qkv_TxHxD = [x.squeeze(0).transpose(0, 1) for x in (query_1xHxTxD, key_1xHxTxD, value_1xHxTxD)]
    reach = -1 if options.window is None else options.window - 1
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    if not segments.flash:
        return torch_private.flash_attention(qkv_TxHxD, cu_seqlens, max_seqlen, options.scaling, options.dropout, reach)
    slopes_H = None if segments.slope is None else segments.slope.repeat(query_1xHxTxD.shape[1])
    out_TxHxD: Tensor = flash_attn_varlen_func(
        *(*qkv_TxHxD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, options.dropout),
        softmax_scale=options.scaling,
        window_size=(reach, reach),
        alibi_slopes=slopes_H,
    )
    return out_TxHxD


def _block_mask(cu_seqlens: Tensor, num_tokens: int, window: int | None) -> BlockMask:
    """Which tokens see which, by blocks of 128: from the samples at each block's ends, never from all pairs of tokens.

    (`create_block_mask` would look at T * T pairs: gigabytes for a row of 65,536 tokens.)
    """
    samples_T = samples_of_tokens(cu_seqlens, num_tokens)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        same = samples_T[query] == samples_T[key]
        return same if window is None else same & ((query - key).abs() < window)

    num_blocks = -(-num_tokens // _BLOCK)
    blocks_B = torch.arange(num_blocks, device=cu_seqlens.device)
    first_B = samples_T[blocks_B * _BLOCK]
    last_B = samples_T[((blocks_B + 1) * _BLOCK - 1).clamp(max=num_tokens - 1)]
    some_BxB = (first_B[:, None] <= last_B) & (first_B <= last_B[:, None])
    if window is not None:
        gap_BxB = (blocks_B[:, None] - blocks_B).abs() * _BLOCK - (_BLOCK - 1)  # between their nearest tokens
        some_BxB &= gap_BxB < window
    order = some_BxB.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        some_BxB.sum(-1, dtype=torch.int32)[None, None],
        order[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


def _plain_flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, slope: Tensor | None, scaling: float
) -> Tensor:
    def with_bias(score: Tensor, batch: Tensor, head: Tensor, query_place: Tensor, key_place: Tensor) -> Tensor:
        del batch, head
        assert slope is not None
        return score - slope * (query_place - key_place).abs()

    out = flex_attention(query, key, value, None if slope is None else with_bias, block_mask=mask, scale=scaling)
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Not at import: torch.compile imports its compiler."""
    return torch.compile(_plain_flex)
