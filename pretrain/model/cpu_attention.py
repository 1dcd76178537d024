"""Attention on a CPU: sample after sample, some heads at a time, so that scores stay in the cache and none is padding.

torch has no fused kernel with dropout for CPUs: it would write scores, weights, random numbers and their product to
memory for a whole padded batch. Here the backward pass computes the weights anew (Dao et al. 2022, "FlashAttention",
section 3.1) and draws the same dropout again from a seed.

Shapes: T tokens of a row, H heads, D head width, l tokens of one sample, h heads at a time.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_SCORES = 2**20  # at a time, 4 MiB; one head at least
_LEVELS = 2**16  # dropout compares 16 random bits: a probability of 0.1 is 0.100006


class SampleBounds(NamedTuple):
    """The row as samples: known on the host, where this kernel runs."""

    bounds: list[int]  # first token of each, and the end of the last
    max_seqlen: int
    slope: float = 0.0  # of the distance bias: scores get minus this times the distance in tokens


class Options(NamedTuple):
    """What a layer tells its kernel."""

    scaling: float  # of the scores
    dropout: float  # probability
    window: int | None  # tokens see those nearer than this; None: the whole sample


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    query_HxTxD: Tensor, key_HxTxD: Tensor, value_HxTxD: Tensor, samples: SampleBounds, options: Options
) -> Tensor:
    """Softmax attention of every token to its own sample's tokens, to those in its window where it has one.

    Scores get minus `samples.slope` times the distance in tokens (Press et al. 2022, section 3); 0 costs nothing.

    Computed in fp32 (or fp64), returned as [H, T, D] in the dtype of `query_HxTxD`; zeros where there is no sample.
    """
    qkv = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_HxTxD, key_HxTxD, value_HxTxD)]
    seed = int(torch.randint(2**62, ())) if options.dropout else 0
    out: Tensor = _Attention.apply(*qkv, (samples, options, seed))  # type: ignore[no-untyped-call]
    return out.to(query_HxTxD.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: tuple[SampleBounds, Options, int]) -> Tensor:
        work = _Workspace(query, *how)
        out = work.new_result()
        for at, size in work.chunks():
            weights = work.weights(query[at], key[at])
            kept = work.kept(size)
            if kept is not None:
                weights.mul_(kept)
            out[at] = torch.bmm(weights, value[at], out=work.rows(size))
        out.mul_(work.grown)
        ctx.save_for_backward(query, key, value, out)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        work = _Workspace(query, *ctx.how)
        d_query, d_key, d_value = (work.new_result() for _ in range(3))
        means_HxTx1 = (grads[0] * out).sum(-1, keepdim=True)  # of the weights' gradients, under the weights
        d_out = grads[0] * work.grown
        for at, size in work.chunks():
            weights = work.weights(query[at], key[at])
            kept = work.kept(size)
            d_scores = torch.bmm(d_out[at], value[at].transpose(1, 2), out=work.scores(size))
            if kept is not None:
                d_scores.mul_(kept)
            d_scores.sub_(means_HxTx1[at]).mul_(weights)
            if kept is not None:
                weights.mul_(kept)
            rows = work.rows(size)
            d_value[at] = torch.bmm(weights.transpose(1, 2), d_out[at], out=rows)
            d_query[at] = torch.bmm(d_scores, key[at], out=rows)
            d_key[at] = torch.bmm(d_scores.transpose(1, 2), query[at], out=rows)
        scaling = ctx.how[1].scaling
        return d_query.mul_(scaling), d_key.mul_(scaling), d_value, None


class _Workspace:
    """Memory for one chunk, used again for each: sizes that never come twice would make the heap grow."""

    def __init__(self, query_HxTxD: Tensor, samples: SampleBounds, options: Options, seed: int) -> None:
        self._num_heads, _, self._width = query_HxTxD.shape
        self._like = query_HxTxD
        self._samples, self._scaling, self._window = samples, options.scaling, options.window
        self._threshold = round(options.dropout * _LEVELS)
        self.grown = 1 / (1 - self._threshold / _LEVELS)  # what dropout leaves is scaled by this
        longest = samples.max_seqlen
        most = self._heads(longest) * longest**2
        self._scores, self._weights = query_HxTxD.new_empty(most), query_HxTxD.new_empty(most)
        self._rows = query_HxTxD.new_empty(self._num_heads * longest * self._width)
        self._bias_LxL = None
        if samples.slope:
            places_L = torch.arange(longest, dtype=query_HxTxD.dtype)
            self._bias_LxL = (places_L[:, None] - places_L).abs_().mul_(-samples.slope)
        if options.dropout:
            self._generator = torch.Generator().manual_seed(seed)
            self._random = torch.empty(-(-most // 4), dtype=torch.int64)
            self._kept = query_HxTxD.new_empty(most)

    def _heads(self, length: int) -> int:
        return min(self._num_heads, max(1, _CHUNK_SCORES // length**2))

    def chunks(self) -> Iterator[tuple[tuple[slice, slice], tuple[int, int]]]:
        """(heads and tokens, how many of each), always in the same order: dropout follows it."""
        for start, end in pairwise(self._samples.bounds):
            heads = self._heads(end - start)
            for first in range(0, self._num_heads, heads):
                last = min(first + heads, self._num_heads)
                yield (slice(first, last), slice(start, end)), (last - first, end - start)

    def new_result(self) -> Tensor:
        """[H, T, D], zeros where there is no sample, else not filled yet."""
        result = torch.empty_like(self._like)
        result[:, : self._samples.bounds[0]] = 0
        result[:, self._samples.bounds[-1] :] = 0
        return result

    def scores(self, size: tuple[int, int]) -> Tensor:
        return _view(self._scores, size)

    def rows(self, size: tuple[int, int]) -> Tensor:
        heads, length = size
        return self._rows[: heads * length * self._width].view(heads, length, self._width)

    def weights(self, query_hxlxD: Tensor, key_hxlxD: Tensor) -> Tensor:
        """softmax(query key^T * scaling + bias), [h, l, l]."""
        heads, length, _ = query_hxlxD.shape
        scores = self.scores((heads, length))
        beta = 0
        if self._bias_LxL is not None:
            scores.copy_(self._bias_LxL[:length, :length])
            beta = 1
        torch.baddbmm(scores, query_hxlxD, key_hxlxD.transpose(1, 2), beta=beta, alpha=self._scaling, out=scores)
        if self._window is not None and length > self._window:
            places = torch.arange(length)
            scores.masked_fill_((places[:, None] - places).abs_() >= self._window, -torch.inf)
        # torch.softmax(…, out=…) computes elsewhere and copies.
        weights: Tensor = torch.ops.aten._softmax.out(scores, -1, False, out=_view(self._weights, (heads, length)))
        return weights

    def kept(self, size: tuple[int, int]) -> Tensor | None:
        """1 where dropout keeps a weight, else 0, [h, l, l]: the next draw of this workspace.

        In the weights' type: a product with bool would first be converted, and take twelve times as long.
        """
        if not self._threshold:
            return None
        count = size[0] * size[1] ** 2
        random = self._random[: -(-count // 4)].random_(-(2**63), None, generator=self._generator)
        bits = random.view(torch.int16)[:count]
        return _view(torch.ge(bits, self._threshold - _LEVELS // 2, out=self._kept[:count]), size)


def _view(flat: Tensor, size: tuple[int, int]) -> Tensor:
    heads, length = size
    return flat[: heads * length**2].view(heads, length, length)
