"""Every kernel against attention of each sample by itself, written out; the choice of a kernel. On GPUs: tests/gpu."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cloze.errors import UserError
from pretrain.config import Attention, ModelConfig, Precision
from pretrain.data.loader import TOKENS_MULTIPLE, MicroBatch
from pretrain.model import attention, cpu_attention
from pretrain.model.attention import choose_kernel, packed_attention, packing
from tests.unit import slow_flash
from tests.unit.test_model import small

HEADS, WIDTH, SCALE = 2, 16, 0.3
KERNELS = [Attention.sdpa, Attention.flex, Attention.varlen, Attention.flash]
CPU_KERNELS = [*KERNELS, Attention.cpu]
DROPPING = [Attention.sdpa, Attention.varlen, Attention.flash, Attention.cpu]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [[5], [40, 1, 17], [200, 30, 129, 7], [32] * 9 + [7, 128, 128, 128, 1, 1]]


def row_of(lengths: list[int], device: torch.device) -> MicroBatch:
    """Samples of these lengths, filled up as `bounded` does; only what attention reads is real."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.zeros(sum(lengths) + -sum(lengths) % TOKENS_MULTIPLE, dtype=torch.long)
    nothing = torch.zeros(0, dtype=torch.long)
    longest = max(lengths) + -max(lengths) % 16
    return MicroBatch(
        tokens, tokens, tokens, ends, nothing, nothing, nothing, longest, 0, sum(lengths), 0
    ).to(device)  # fmt: skip


def one_by_one(qkv: list[Tensor], lengths: list[int], window: int | None, slope: float = 0.0) -> Tensor:
    """Softmax attention of each sample alone, [T, H, D] of its real tokens."""
    outs = []
    for start, end in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        query, key, value = (x[0, :, start:end].double() for x in qkv)
        places = torch.arange(end - start, device=query.device)
        scores = query @ key.transpose(1, 2) * SCALE - slope * (places[:, None] - places).abs()
        if window is not None:
            scores = scores.masked_fill((places[:, None] - places).abs() >= window, -torch.inf)
        outs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outs)


def attend(
    kernel: Attention, lengths: list[int], window: int | None, device: torch.device, dtype: torch.dtype,
    slope: float = 0.0,
) -> None:  # fmt: skip
    """Outputs equal the reference's; gradients too, where the kernel has them on this device."""
    batch = row_of(lengths, device)
    torch.manual_seed(len(lengths))
    trains = not (kernel is Attention.flex and device == CPU)
    qkv = [
        torch.randn(1, HEADS, len(batch.input_ids_T), WIDTH, device=device, dtype=dtype, requires_grad=trains)
        for _ in range(3)
    ]
    packed = packing(kernel, batch, window, slope)
    out_TxHxD = packed_attention(
        torch.nn.Identity(), *qkv, None, packing=packed, scaling=SCALE, sliding_window=window
    )[0][0]  # fmt: skip
    expected = one_by_one(qkv, lengths, window, slope)
    real, tolerance = out_TxHxD[: sum(lengths)].double(), 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(real, expected, atol=tolerance, rtol=tolerance)
    if trains:
        weights = torch.randn_like(expected)
        theirs = torch.autograd.grad((expected * weights).sum(), qkv)
        for mine, other in zip(torch.autograd.grad((real * weights).sum(), qkv), theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=tolerance * 3, rtol=tolerance)


def attended(kernel: Attention, lengths: list[int], qkv: list[Tensor], dropout: float, seed: int) -> Tensor:
    """[T, H, D] of the real tokens, with the dropout that follows from `seed`."""
    torch.manual_seed(seed)
    packed = packing(kernel, row_of(lengths, qkv[0].device))
    out_1xTxHxD, _ = packed_attention(torch.nn.Identity(), *qkv, None, packing=packed, scaling=SCALE, dropout=dropout)
    return out_1xTxHxD[0, : sum(lengths)]


def drop(kernel: Attention, device: torch.device, dtype: torch.dtype) -> None:
    """With values that are the identity, what comes out are the weights: 0, or the softmax over 1 - p.

    Gradients are those of the weights that were kept: both passes draw alike.
    """
    lengths, heads, width, dropout = [64, 64, 1, 63], 3, 64, 0.1
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.manual_seed(1)
    query, key, value, weights = (torch.randn(1, heads, 256, width, device=device, dtype=dtype) for _ in range(4))
    eye = torch.eye(width, device=device, dtype=dtype)
    identity = torch.cat([*(eye[:length] for length in lengths), eye])[:256].expand(1, heads, -1, -1).contiguous()
    whole = attended(kernel, lengths, [query, key, identity], 0.0, 1)
    thinned = attended(kernel, lengths, [query, key, identity], dropout, 1)
    kept = thinned != 0
    torch.testing.assert_close(thinned[kept], (whole / (1 - dropout))[kept], atol=tolerance / 10, rtol=tolerance)
    drawn = kept[whole > 1e-4 if dtype is not torch.float32 else whole != 0]
    assert abs(1 - drawn.double().mean().item() - dropout) < 4 * (dropout * (1 - dropout) / drawn.numel()) ** 0.5
    assert torch.equal(thinned, attended(kernel, lengths, [query, key, identity], dropout, 1))
    assert not torch.equal(thinned, attended(kernel, lengths, [query, key, identity], dropout, 2))

    qkv = [x.clone().requires_grad_() for x in (query, key, value)]
    out_TxHxD = attended(kernel, lengths, qkv, dropout, 1)
    scale = kept.double() / (1 - dropout)  # [T, H, L]: a row's columns are places in its sample
    outs = []
    for start, end in pairwise(torch.tensor([0, *lengths]).cumsum(0).tolist()):
        q, k, v = (x[0, :, start:end].double() for x in qkv)
        mask = scale[start:end, :, : end - start].transpose(0, 1)
        outs.append((((q @ k.transpose(1, 2) * SCALE).softmax(-1) * mask) @ v).transpose(0, 1))
    expected = torch.cat(outs)
    torch.testing.assert_close(out_TxHxD.double(), expected, atol=tolerance, rtol=tolerance)
    weights = weights[0, :, : len(expected)].transpose(0, 1).double()
    theirs = torch.autograd.grad((expected * weights).sum(), qkv)
    for mine, other in zip(torch.autograd.grad((out_TxHxD * weights).sum(), qkv), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance * 3, rtol=tolerance)


@pytest.fixture
def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_attn_varlen_func", slow_flash.flash_attn_varlen_func)


@pytest.mark.usefixtures("with_flash")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 4, 65])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_kernels_on_a_cpu(
    kernel: Attention, lengths: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients, but for flex, which is not compiled here; varlen and flash by slow twins."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention._plain_flex)
    attend(kernel, lengths, window, CPU, torch.float32)


@pytest.mark.usefixtures("with_flash")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 65])
@pytest.mark.parametrize("slope", [0.01, 1.0])
@pytest.mark.parametrize("kernel", [kernel for kernel in CPU_KERNELS if kernel is not Attention.varlen])
def test_distance_bias(kernel: Attention, slope: float, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores minus slope times distance: outputs and gradients of every kernel that can train with it."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: attention._plain_flex)
    for lengths in LENGTHS:
        attend(kernel, lengths, window, CPU, torch.float32, slope)


def test_no_kernel_trains_with_a_bias_that_its_gradient_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    assert attention.kernel_with_bias(Attention.varlen) is Attention.sdpa
    for kernel in (Attention.sdpa, Attention.flash, Attention.flex, Attention.cpu):
        assert attention.kernel_with_bias(kernel) is kernel
    monkeypatch.setattr(attention, "flash_attn_varlen_func", slow_flash.flash_attn_varlen_func)
    assert attention.kernel_with_bias(Attention.varlen) is Attention.flash
    with pytest.raises(AssertionError, match="kernel_with_bias"):
        packing(Attention.varlen, row_of([5], CPU), slope=0.5)


@pytest.mark.usefixtures("with_flash")
@pytest.mark.parametrize("kernel", DROPPING)
def test_dropout_on_a_cpu(kernel: Attention) -> None:
    drop(kernel, CPU, torch.float32)


def test_dropout_of_the_cpu_kernel_does_not_need_all_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_CHUNK_SCORES", 1)
    drop(Attention.cpu, CPU, torch.float32)


def test_a_sample_shorter_than_the_longest_may_have_more_scores_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heads fit together, of the longest only one does."""
    monkeypatch.setattr(cpu_attention, "_CHUNK_SCORES", HEADS * 40**2)
    monkeypatch.setattr(cpu_attention, "_TOGETHER_TOKENS", 1)
    attend(Attention.cpu, [40, 41, 40], None, CPU, torch.float32)


def test_varlen_is_a_call_that_torch_takes_on_a_gpu() -> None:
    """With tensors that have a device and no storage, so without a GPU: torch checks names, types and shapes."""
    with FakeTensorMode(), torch.no_grad():
        qkv = [torch.empty(1, HEADS, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        segments = attention.Segments(torch.empty(5, dtype=torch.int32, device="cuda"), 64, False, None)
        out, _ = packed_attention(
            torch.nn.Identity(), *qkv, None, packing=segments, scaling=SCALE, dropout=0.1, sliding_window=9
        )  # fmt: skip
    assert (out.shape, out.dtype, out.device.type) == ((1, 256, HEADS, 64), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("precision", "capability", "chosen"),
    [
        (Precision.bf16, (9, 0), Attention.varlen),
        (Precision.fp16, (8, 0), Attention.varlen),
        (Precision.fp32, (9, 0), Attention.sdpa),
        (Precision.fp16, (7, 0), Attention.sdpa),
        (Precision.bf16, None, Attention.cpu),
    ],
)
def test_auto(dropout: float, precision: Precision, capability: tuple[int, int] | None, chosen: Attention) -> None:
    assert choose_kernel(small(attention_dropout=dropout), precision, capability) is chosen


def narrow(kernel: Attention) -> ModelConfig:
    return small(attention=kernel, hidden_size=48, num_heads=4)


@pytest.mark.parametrize(
    ("model", "precision", "capability", "line"),
    [
        (small(attention=Attention.varlen), Precision.bf16, None, "varlen: needs a GPU"),
        (small(attention=Attention.flash), Precision.bf16, None, "flash: needs a GPU"),
        (small(attention=Attention.flex), Precision.bf16, None, "flex: needs a GPU"),
        (small(attention=Attention.cpu), Precision.bf16, (9, 0), "cpu: the model is on a GPU"),
        (small(attention=Attention.varlen), Precision.fp32, (9, 0), "varlen: has no fp32"),
        (small(attention=Attention.varlen), Precision.fp16, (7, 5), "varlen: needs a GPU of compute capability 8.0"),
        (narrow(Attention.varlen), Precision.bf16, (9, 0), "not 12"),
        (narrow(Attention.flex), Precision.bf16, (9, 0), "needs heads at least 16 wide, not 12"),
        (small(attention=Attention.flash), Precision.bf16, (9, 0), "flash-attn is not installed"),
    ],
)
def test_a_kernel_that_cannot_run_is_one_line(
    model: ModelConfig, precision: Precision, capability: tuple[int, int] | None, line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    with pytest.raises(UserError, match=line) as caught:
        choose_kernel(model, precision, capability)
    assert str(caught.value).endswith("; use model.attention=auto")
    assert "\n" not in str(caught.value)


def test_dropout_is_never_dropped() -> None:
    with pytest.raises(UserError, match="flex: knows no dropout"):
        small(attention=Attention.flex, attention_dropout=0.1)
