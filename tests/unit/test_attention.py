"""Every kernel against attention of each sample by itself, written out; the choice of a kernel; what is compiled."""

import importlib.util
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from data_prep.errors import UserError
from pretrain import attention, cpu_attention
from pretrain.attention import choose_kernel, packed_attention, packing
from pretrain.config import Attention, ModelConfig, Precision
from pretrain.cpu_attention import Samples
from pretrain.cpu_attention import attend as attend_on_cpu
from pretrain.loader import TOKENS_MULTIPLE, MicroBatch, bounded
from pretrain.model import PackedBert
from tests.unit.test_model import FACTS, losses_of, make_batch, small

HEADS, WIDTH, SCALE = 2, 8, 0.3
KERNELS = [Attention.sdpa, Attention.flex, Attention.varlen, Attention.flash]
CPU_KERNELS = [*KERNELS, Attention.cpu]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [[5], [40, 1, 17], [200, 30, 129, 7]]


def row_of(lengths: list[int], device: torch.device) -> MicroBatch:
    """Samples of these lengths, filled up as `bounded` does; only what attention reads is real."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.zeros(sum(lengths) + -sum(lengths) % TOKENS_MULTIPLE, dtype=torch.long)
    nothing = torch.zeros(0, dtype=torch.long)
    longest = max(lengths) + -max(lengths) % 16
    return MicroBatch(
        tokens, tokens, tokens, ends, nothing, nothing, nothing, longest, 0, sum(lengths), 0
    ).to(device)  # fmt: skip


def one_by_one(qkv: list[Tensor], lengths: list[int], window: int | None) -> Tensor:
    """Softmax attention of each sample alone, [T, H, D] of its real tokens."""
    outs = []
    for start, end in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        query, key, value = (x[0, :, start:end].double() for x in qkv)
        scores = query @ key.transpose(1, 2) * SCALE
        if window is not None:
            places = torch.arange(end - start, device=scores.device)
            scores = scores.masked_fill((places[:, None] - places).abs() >= window, -torch.inf)
        outs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outs)


def segment_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *rest: Any,
    **how: Any,
) -> Tensor:
    """What the variable-length kernels do, as their documentation has it: every token must lie in a segment."""
    assert query.shape == key.shape == value.shape
    assert query.dtype != torch.int32
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[0] == 0
    assert cu_q[-1] == len(query)
    assert cu_q.diff().max() <= max_q == max_k
    left, right = how["window_size"]
    outs = []
    for start, end in pairwise(cu_q.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end])
        scores = scores * how.get("scale", how.get("softmax_scale"))
        if left >= 0:
            distance = torch.arange(end - start) - torch.arange(end - start)[:, None]
            scores = scores.masked_fill((distance < -left) | (distance > right), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end]))
    return torch.cat(outs)


class FakeFlash(NamedTuple):
    flash_attn_varlen_func: Any = segment_by_segment
    varlen_attn: Any = segment_by_segment


def attend(kernel: Attention, lengths: list[int], window: int | None, device: torch.device, dtype: torch.dtype) -> None:
    """Outputs equal the reference's; gradients too, where the kernel has them on this device."""
    batch = row_of(lengths, device)
    torch.manual_seed(len(lengths))
    trains = not (kernel is Attention.flex and device == CPU)
    qkv = [
        torch.randn(1, HEADS, len(batch.input_ids_T), WIDTH, device=device, dtype=dtype, requires_grad=trains)
        for _ in range(3)
    ]
    packed = packing(kernel, batch, window)
    out_TxHxD = packed_attention(
        torch.nn.Identity(), *qkv, None, packing=packed, scaling=SCALE, sliding_window=window
    )[0][0]  # fmt: skip
    expected = one_by_one(qkv, lengths, window)
    real, tolerance = out_TxHxD[: sum(lengths)].double(), 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(real, expected, atol=tolerance, rtol=tolerance)
    if trains:
        weights = torch.randn_like(expected)
        theirs = torch.autograd.grad((expected * weights).sum(), qkv)
        for mine, other in zip(torch.autograd.grad((real * weights).sum(), qkv), theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=tolerance * 3, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 4, 65])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_kernels_on_a_cpu(
    kernel: Attention, lengths: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sdpa with gradients, flex not compiled, varlen and flash with a kernel that checks what it is given."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention._plain_flex)
    if kernel in (Attention.varlen, Attention.flash):
        monkeypatch.setattr(importlib, "import_module", lambda _: FakeFlash())
    attend(kernel, lengths, window, CPU, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 4, 65])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_on_a_gpu(kernel: Attention, lengths: list[int], window: int | None) -> None:
    if kernel is Attention.flash and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    attend(kernel, lengths, window, CUDA, torch.bfloat16)


def on_gpu(monkeypatch: pytest.MonkeyPatch, *, flash: bool, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if flash else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@pytest.mark.parametrize(
    ("dropout", "flash", "capability", "precision", "chosen"),
    [
        (0.0, False, (9, 0), Precision.bf16, Attention.varlen),
        (0.0, True, (8, 0), Precision.fp16, Attention.varlen),
        (0.1, True, (9, 0), Precision.bf16, Attention.flash),
        (0.1, False, (9, 0), Precision.bf16, Attention.sdpa),  # never without the dropout that was asked for
        (0.0, True, (9, 0), Precision.fp32, Attention.sdpa),
        (0.0, True, (7, 0), Precision.fp16, Attention.sdpa),
    ],
)
def test_auto_on_a_gpu(
    dropout: float, flash: bool, capability: tuple[int, int], precision: Precision, chosen: Attention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_gpu(monkeypatch, flash=flash, capability=capability)
    assert choose_kernel(small(attention_dropout=dropout), CUDA, precision) is chosen


def wide(kernel: Attention) -> ModelConfig:
    return small(attention=kernel, hidden_size=48, num_heads=4)


@pytest.mark.parametrize(
    ("model", "device", "precision", "line"),
    [
        (small(attention=Attention.varlen), CPU, Precision.bf16, "varlen: needs a GPU"),
        (small(attention=Attention.flash), CPU, Precision.bf16, "flash: needs a GPU"),
        (small(attention=Attention.flex), CPU, Precision.bf16, "flex: torch does not train with it on a CPU"),
        (small(attention=Attention.cpu), CUDA, Precision.bf16, "cpu: the model is on a GPU"),
        (small(attention=Attention.varlen), CUDA, Precision.fp32, "varlen: has no fp32"),
        (wide(Attention.varlen), CUDA, Precision.bf16, "not 12"),
        (small(attention=Attention.flash), CUDA, Precision.bf16, "flash-attn is not installed"),
    ],
)
def test_a_kernel_that_cannot_run_is_one_line(
    model: ModelConfig, device: torch.device, precision: Precision, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, flash=False)
    with pytest.raises(UserError, match=line) as caught:
        choose_kernel(model, device, precision)
    assert "\n" not in str(caught.value)


def drawn(qkv: list[Tensor], lengths: list[int], dropout: float, seed: int) -> Tensor:
    """The CPU kernel with the dropout that follows from `seed`, [H, T, D]."""
    torch.manual_seed(seed)
    samples = Samples([0, *torch.tensor(lengths).cumsum(0).tolist()], max(lengths))
    return attend_on_cpu(*qkv, samples, SCALE, dropout, None)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_dropout_on_a_cpu(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With values that are the identity, what comes out are the weights: 0, or the softmax over 1 - p."""
    monkeypatch.setattr(cpu_attention, "_CHUNK_SCORES", chunk)  # one head at a time, or all
    torch.manual_seed(1)
    lengths, heads, dropout = [64, 1, 63], 3, 0.1
    query, key = (torch.randn(heads, sum(lengths), 64, dtype=torch.float64) for _ in range(2))
    value = torch.cat([torch.eye(64, dtype=torch.float64)[:length] for length in lengths]).expand(heads, -1, -1)
    whole = drawn([query, key, value], lengths, 0.0, 1)
    thinned = drawn([query, key, value], lengths, dropout, 1)
    kept = (thinned != 0)[whole != 0]
    torch.testing.assert_close(thinned[thinned != 0], (whole / (1 - dropout))[thinned != 0], atol=0, rtol=1e-5)
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - dropout) < 4 * deviation
    assert torch.equal(thinned, drawn([query, key, value], lengths, dropout, 1))
    assert not torch.equal(thinned, drawn([query, key, value], lengths, dropout, 2))


def test_gradients_through_dropout_on_a_cpu() -> None:
    """Against finite differences: forward and backward pass draw alike."""
    torch.manual_seed(1)
    qkv = [torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: drawn(list(x), [5, 1, 3], 0.5, 3), qkv)


@pytest.mark.parametrize("kernel", [Attention.varlen, Attention.flex])
def test_dropout_is_never_dropped(kernel: Attention) -> None:
    with pytest.raises(UserError, match="knows no dropout"):
        small(attention=kernel, attention_dropout=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", [Attention.sdpa, Attention.varlen])
def test_the_host_never_waits_for_the_device_in_forward_and_backward(kernel: Attention) -> None:
    config = small(max_positions=64)
    model = PackedBert(config, FACTS, max_len=64, kernel=kernel).to(CUDA, torch.bfloat16)
    batches = [bounded(make_batch(seed, 16)).pin_memory() for seed in range(3)]
    losses_of(model, batches[0].to(CUDA)).backward()  # the first call sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            losses_of(model, batch.to(CUDA)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
