"""Kernels on a GPU as on a CPU, and that the host never waits for it inside a micro-batch."""

import pytest
import torch

from pretrain.config import Attention, Precision
from pretrain.data.loader import bounded
from pretrain.model.attention import choose_kernel, flash_attn_varlen_func
from pretrain.model.bert import PackedBert
from tests.unit.test_attention import CUDA, LENGTHS, attend, drop
from tests.unit.test_model import FACTS, losses_of, make_batch, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KERNELS = [
    Attention.sdpa,
    Attention.varlen,
    pytest.param(
        Attention.flash, marks=pytest.mark.skipif(flash_attn_varlen_func is None, reason="flash-attn is not installed")
    ),
]


@pytest.mark.parametrize("window", [None, 4, 65])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", [*KERNELS, Attention.flex])
def test_outputs_and_gradients(kernel: Attention, lengths: list[int], window: int | None) -> None:
    attend(kernel, lengths, window, CUDA, torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout(kernel: Attention) -> None:
    drop(kernel, CUDA, torch.bfloat16)


def test_auto_does_not_pad() -> None:
    capability = torch.cuda.get_device_capability()
    assert choose_kernel(small(attention_dropout=0.1), Precision.bf16, capability) is Attention.varlen


@pytest.mark.parametrize("kernel", [Attention.sdpa, Attention.varlen])
def test_the_host_never_waits_in_forward_and_backward(kernel: Attention) -> None:
    config = small(max_positions=64, dropout=0.1, attention_dropout=0.1)
    model = PackedBert(config, FACTS, max_len=64, kernel=kernel).to(CUDA, torch.bfloat16)
    batches = [bounded(make_batch(seed, 16)).pin_memory() for seed in range(3)]
    losses_of(model, batches[0].to(CUDA)).backward()  # the first call sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            losses_of(model, batch.to(CUDA)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
