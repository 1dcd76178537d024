"""Attention on a CPU: sample after sample, some heads at a time, so that scores stay in the cache and none is padding.

Short samples of the same length that follow each other are taken together: each call of an operator has its price.

torch has no fused kernel with dropout for CPUs: it would write scores, weights, random numbers and their product to
memory for a whole padded batch. Here the backward pass computes the weights anew (Dao et al. 2022, "FlashAttention",
section 3.1) and draws the same dropout again from a seed.

Shapes: T tokens of a row, H heads, D head width, l tokens of one sample, B heads of samples at a time.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK_SCORES = 2**20  # at a time, 4 MiB; one head at least
_TOGETHER_TOKENS = 256  # of samples that are taken together
_LEVELS = 2**16  # dropout compares 16 random bits: a probability of 0.1 is 0.100006


class SampleBounds(NamedTuple):
    """The row as samples: known on the host, where this kernel runs."""

    bounds: list[int]  # first token of each, and the end of the last
    max_seqlen: int
    slope: float = 0.0  # of the distance bias: scores get minus this times the distance in tokens


class _Chunk(NamedTuple):
    """What is computed at a time: some heads of some samples of one length."""

    heads: slice
    tokens: slice
    num_heads: int
    num_samples: int
    length: int

    @property
    def batch(self) -> int:
        """B."""
        return self.num_heads * self.num_samples

    def of(self, x_HxTxD: Tensor) -> Tensor:
        """Its elements as a view, [heads, samples, l, D]."""
        part = x_HxTxD[self.heads, self.tokens]
        return part.view(self.num_heads, self.num_samples, self.length, -1)


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
        for chunk in work.chunks():
            q_BxlxD, k_BxlxD, v_BxlxD = work.cut(chunk, query, key, value)
            weights = work.weights(q_BxlxD, k_BxlxD)
            kept = work.kept(chunk)
            if kept is not None:
                weights.mul_(kept)
            work.put(chunk, out, weights, v_BxlxD)
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
        for chunk in work.chunks():
            q_BxlxD, k_BxlxD, v_BxlxD, d_BxlxD = work.cut(chunk, query, key, value, d_out)
            weights = work.weights(q_BxlxD, k_BxlxD)
            kept = work.kept(chunk)
            d_scores = torch.bmm(d_BxlxD, v_BxlxD.transpose(1, 2), out=work.scores(chunk.batch, chunk.length))
            if kept is not None:
                d_scores.mul_(kept)
            d_scores.sub_(chunk.of(means_HxTx1).flatten(0, 1)).mul_(weights)
            if kept is not None:
                weights.mul_(kept)
            work.put(chunk, d_value, weights.transpose(1, 2), d_BxlxD)
            work.put(chunk, d_query, d_scores, k_BxlxD)
            work.put(chunk, d_key, d_scores.transpose(1, 2), q_BxlxD)
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
        together = self._num_heads * _TOGETHER_TOKENS
        most = max(
            min(self._num_heads * longest**2, max(_CHUNK_SCORES, longest**2)),
            together * min(longest, _TOGETHER_TOKENS // 2),
        )
        self._scores, self._weights = query_HxTxD.new_empty(most), query_HxTxD.new_empty(most)
        self._rows = query_HxTxD.new_empty(max(self._num_heads * longest, together) * self._width)
        self._operands = [query_HxTxD.new_empty(together * self._width) for _ in range(4)]
        self._bias_LxL = None
        if samples.slope:
            places_L = torch.arange(longest, dtype=query_HxTxD.dtype)
            self._bias_LxL = (places_L[:, None] - places_L).abs_().mul_(-samples.slope)
        if options.dropout:
            self._generator = torch.Generator().manual_seed(seed)
            self._random = torch.empty(-(-most // 4), dtype=torch.int64)
            self._kept = query_HxTxD.new_empty(most)

    def chunks(self) -> Iterator[_Chunk]:
        """Always the same, in the same order: dropout follows it."""
        start = self._samples.bounds[0]
        for length, count in self._runs():
            end = start + count * length
            heads = min(self._num_heads, max(1, _CHUNK_SCORES // (count * length**2)))
            for first in range(0, self._num_heads, heads):
                last = min(first + heads, self._num_heads)
                yield _Chunk(slice(first, last), slice(start, end), last - first, count, length)
            start = end

    def _runs(self) -> Iterator[tuple[int, int]]:
        """(length, how many) of samples that are taken together."""
        lengths = (end - start for start, end in pairwise(self._samples.bounds))
        for length, alike in groupby(lengths):
            left, most = sum(1 for _ in alike), max(1, _TOGETHER_TOKENS // length)
            while left:
                count = min(left, most)
                yield length, count
                left -= count

    def cut(self, chunk: _Chunk, *tensors: Tensor) -> list[Tensor]:
        """[B, l, D] of each [H, T, D]: of one sample a view, else a copy."""
        if chunk.num_samples == 1:
            return [x_HxTxD[chunk.heads, chunk.tokens] for x_HxTxD in tensors]
        size = chunk.batch * chunk.length * self._width
        return [
            buffer[:size].view(chunk.num_heads, chunk.num_samples, chunk.length, -1).copy_(chunk.of(x)).flatten(0, 1)
            for buffer, x in zip(self._operands, tensors, strict=False)
        ]

    def put(self, chunk: _Chunk, out_HxTxD: Tensor, left_Bxlxl: Tensor, right_BxlxD: Tensor) -> None:
        """The product of the two into its place."""
        rows = self._rows[: chunk.batch * chunk.length * self._width].view(chunk.batch, chunk.length, self._width)
        torch.bmm(left_Bxlxl, right_BxlxD, out=rows)
        chunk.of(out_HxTxD).copy_(rows.view(chunk.num_heads, chunk.num_samples, chunk.length, self._width))

    def new_result(self) -> Tensor:
        """[H, T, D], zeros where there is no sample, else not filled yet."""
        result = torch.empty_like(self._like)
        result[:, : self._samples.bounds[0]] = 0
        result[:, self._samples.bounds[-1] :] = 0
        return result

    def scores(self, batch: int, length: int) -> Tensor:
        return _view(self._scores, batch, length)

    def weights(self, query_BxlxD: Tensor, key_BxlxD: Tensor) -> Tensor:
        """softmax(query key^T * scaling + bias), [B, l, l]."""
        batch, length, _ = query_BxlxD.shape
        scores = self.scores(batch, length)
        beta = 0
        if self._bias_LxL is not None:
            scores.copy_(self._bias_LxL[:length, :length])
            beta = 1
        torch.baddbmm(scores, query_BxlxD, key_BxlxD.transpose(1, 2), beta=beta, alpha=self._scaling, out=scores)
        if self._window is not None and length > self._window:
            places = torch.arange(length)
            scores.masked_fill_((places[:, None] - places).abs_() >= self._window, -torch.inf)
        # torch.softmax(…, out=…) computes elsewhere and copies.
        weights: Tensor = torch.ops.aten._softmax.out(scores, -1, False, out=_view(self._weights, batch, length))
        return weights

    def kept(self, chunk: _Chunk) -> Tensor | None:
        """1 where dropout keeps a weight, else 0, [B, l, l]: the next draw of this workspace.

        In the weights' type: a product with bool would first be converted, and take twelve times as long.
        """
        if not self._threshold:
            return None
        count = chunk.batch * chunk.length**2
        random = self._random[: -(-count // 4)].random_(-(2**63), None, generator=self._generator)
        bits = random.view(torch.int16)[:count]
        return _view(torch.ge(bits, self._threshold - _LEVELS // 2, out=self._kept[:count]), chunk.batch, chunk.length)


def _view(flat: Tensor, batch: int, length: int) -> Tensor:
    return flat[: batch * length**2].view(batch, length, length)
