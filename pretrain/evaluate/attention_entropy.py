"""How widely each layer looks: the entropy of its attention on held-out samples.

ln(n) is attention to all n tokens of a sample alike, 0 to a single one. Scores are computed beside the kernel, which
keeps none. Shapes: T tokens of a row, H heads, D head width, l tokens of one sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from pretrain.data.loader import MicroBatch
from pretrain.model.attention import PACKED_ATTENTION, packed_attention


def attention_entropy(batch: MicroBatch, forward: Callable[[MicroBatch], object]) -> dict[str, float]:
    """`layers/NUMBER/attention_entropy`, nats, a mean over heads and tokens; `forward` runs the model on `batch`."""
    found: list[Tensor] = []
    with _observed(batch, found):
        forward(batch)
    return {f"layers/{layer}/attention_entropy": float(value) for layer, value in enumerate(found)}


@contextmanager
def _observed(batch: MicroBatch, found: list[Tensor]) -> Iterator[None]:
    """Each call of the layers' attention, in their order, adds its entropy to `found`."""
    bounds = list(pairwise(batch.cu_seqlens.tolist()))

    def observing(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
        window = kwargs.get("sliding_window")
        parts = [
            _entropies(query[0, :, start:end], key[0, :, start:end], kwargs["scaling"], window) for start, end in bounds
        ]
        found.append(torch.cat(parts, dim=-1).mean().detach())
        return packed_attention(module, query, key, *rest, **kwargs)

    AttentionInterface.register(PACKED_ATTENTION, observing)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _entropies(query_HxlxD: Tensor, key_HxlxD: Tensor, scaling: float, window: int | None) -> Tensor:
    """Of every token of one sample in every head, f32 [H, l]."""
    scores_Hxlxl = query_HxlxD.float() @ key_HxlxD.float().transpose(1, 2) * scaling
    if window is not None:
        places_l = torch.arange(scores_Hxlxl.shape[-1], device=scores_Hxlxl.device)
        scores_Hxlxl = scores_Hxlxl.masked_fill((places_l[:, None] - places_l).abs() >= window, -torch.inf)
    entropies_Hxl: Tensor = torch.special.entr(scores_Hxlxl.softmax(-1)).sum(-1)
    return entropies_Hxl
