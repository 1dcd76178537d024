"""torch's variable-length attention op on a CPU, where it has none: slow, with dropout, and strict in what it takes.

Importing this registers it with torch's dispatcher, which binds a call to the op's own schema and differentiates it by
the op's own formula, as on a GPU.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """One sample's part in attention: weights are `softmax * kept`."""

    rows: slice
    softmax_HxQxK: Tensor
    kept_HxQxK: Tensor  # 0 where dropped, else 1 / (1 - p)


def segments(
    query: Tensor, key: Tensor, cu_seqlens: Tensor, longest: int, dropout: float, scale: float,
    window: tuple[int, int], seed: int, slopes_H: Tensor | None = None,
) -> Iterator[Segment]:  # fmt: skip
    """Every token must lie in one. What is dropped follows from `seed`."""
    assert query.shape == key.shape
    assert query.dtype == key.dtype
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(query)
    assert cu_seqlens.diff().max() <= longest
    generator = torch.Generator().manual_seed(seed)
    for start, end in pairwise(cu_seqlens.tolist()):
        rows = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", query[rows], key[rows]) * scale
        if slopes_H is not None:  # flash-attn's documented form, where queries are as many as keys
            places = torch.arange(end - start)
            scores = scores - slopes_H[:, None, None] * (places[:, None] - places).abs()
        if window[0] >= 0:
            distance = torch.arange(end - start) - torch.arange(end - start)[:, None]
            scores = scores.masked_fill((distance < -window[0]) | (distance > window[1]), -torch.inf)
        kept = (torch.rand(scores.shape, generator=generator) >= dropout) / (1 - dropout)
        yield Segment(rows, scores.softmax(-1), kept.to(query.dtype))


def attend(query: Tensor, key: Tensor, value: Tensor, *how: Any) -> Tensor:
    """[T, H, D]."""
    assert value.dtype == query.dtype
    parts = segments(query, key, *how)
    return torch.cat(
        [torch.einsum("hqk,khd->qhd", part.softmax_HxQxK * part.kept_HxQxK, value[part.rows]) for part in parts]
    )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout_p: float,
    is_causal: bool, return_debug_mask: bool, *, scale: float, window_size_left: int, window_size_right: int,
    **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not is_causal
    assert not return_debug_mask
    assert not any(rest.values())
    assert torch.equal(cu_q, cu_k)
    assert max_q == max_k
    seed = int(torch.randint(2**31, ())) if dropout_p else 0
    window = window_size_left, window_size_right
    out = attend(query, key, value, cu_q, max_q, dropout_p, scale, window, seed)
    rng_state = torch.tensor([seed, 0], dtype=torch.uint64)
    return out, query.new_zeros(query.shape[1], len(query)), rng_state, rng_state[0].clone(), query.new_zeros(0)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cu_q: Tensor,
    cu_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
    scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    del out, logsumexp, cu_k, max_k, is_causal, unused
    window, seed = (window_size_left, window_size_right), int(rng_state[0])
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, softmax, kept in segments(query, key, cu_q, max_q, dropout_p, scale, window, seed):
        grad_softmax = torch.einsum("qhd,khd->hqk", grad_out[rows], value[rows]) * kept
        grad_scores = softmax * (grad_softmax - (grad_softmax * softmax).sum(-1, keepdim=True)) * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", grad_scores, key[rows])
        grads[1][rows] = torch.einsum("hqk,qhd->khd", grad_scores, query[rows])
        grads[2][rows] = torch.einsum("hqk,qhd->khd", softmax * kept, grad_out[rows])
    return grads


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """flash-attn's function of this name, as far as it is used."""
    del cu_seqlens_k, max_seqlen_k, causal
    assert softmax_scale is not None
    seed = int(torch.randint(2**31, ())) if dropout_p else 0
    if alibi_slopes is not None:
        assert alibi_slopes.shape == (q.shape[1],)
        assert alibi_slopes.dtype == torch.float32
    return attend(q, k, v, cu_seqlens_q, max_seqlen_q, dropout_p, softmax_scale, window_size, seed, alibi_slopes)


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("_flash_attention_forward", _forward, "CPU")
_LIBRARY.impl("_flash_attention_backward", _backward, "CPU")
