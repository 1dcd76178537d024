"""How fast a run is: model FLOPs, the peaks of devices, and the meters between two lines of metrics."""

import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.config import ModelConfig

if TYPE_CHECKING:
    import torch

LOCAL_ATTENTION = 128  # ModernBERT: tokens beside itself that a local layer sees
GLOBAL_EVERY = 3  # ModernBERT: of so many layers one sees the whole sample


class Gpu(NamedTuple):
    """A device by what its driver calls it, from its maker's data sheet."""

    pattern: str
    peak_tflops: float  # dense, on tensor cores: bf16, or fp16 where the chip has no bf16
    fp32_tflops: float = 0.0  # without tensor cores; this and the rest for `plan`, where it offers the device
    memory_gib: float = 0.0  # usable
    name: str = ""


# The first pattern that is found in the driver's name counts, so the special case stands before the general one.
GPUS = (
    Gpu(r"GB300|GB200", 2500.0),
    Gpu(r"B300|B200", 2250.0, 80.0, 178.0, "b200"),
    Gpu(r"H200 NVL", 835.5),
    Gpu(r"GH200|H200", 989.4, 67.0, 139.0, "h200"),
    Gpu(r"H100 PCIe", 756.5),
    Gpu(r"H100 NVL", 835.5),
    Gpu(r"H100|H800", 989.4, 67.0, 79.0, "h100"),
    Gpu(r"H20", 148.0),
    Gpu(r"A100.*40GB", 312.0, 19.5, 39.0, "a100-40"),
    Gpu(r"A100|A800", 312.0, 19.5, 79.0, "a100"),
    Gpu(r"A40", 149.7),
    Gpu(r"A10G", 70.0),
    Gpu(r"A10", 125.0),
    Gpu(r"RTX A6000", 154.8),
    Gpu(r"RTX 6000 Ada Generation", 364.2),
    Gpu(r"L40S", 362.1, 91.6, 44.0, "l40s"),
    Gpu(r"L40", 181.1),
    Gpu(r"L4", 121.0),
    Gpu(r"V100", 125.0),
    Gpu(r"T4", 65.0),
    Gpu(r"RTX 5090", 209.5),
    Gpu(r"RTX 4090", 165.2, 82.6, 23.0, "rtx4090"),
    Gpu(r"RTX 3090", 71.0),
    Gpu(r"MI300X", 1307.4),
)
_NOT_THE_WHOLE_CHIP = re.compile(r"\b(MIG|Laptop|Max-Q|Mobile|D)\b")


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of one accelerator by its name, or None where it is not known (then there is no MFU)."""
    if _NOT_THE_WHOLE_CHIP.search(device_name):
        return None
    for gpu in GPUS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{gpu.pattern})(?![A-Za-z0-9])", device_name):
            return gpu.peak_tflops * 1e12
    return None


def training_flops(
    model: ModelConfig, vocab_rows: int, lengths_sum: int, lengths_squared_sum: int, masked: int, pairs: int
) -> float:
    """FLOPs of the matrix products that training on these samples needs, forward and backward; real tokens only.

    A product of [m, k] with [k, n] is m*n multiplications and additions per k: 2*m*k*n FLOPs. Its backward pass is two
    products of that size (gradient of each factor), so training costs 3 times the forward pass: 6 FLOPs per weight
    and row. With width h, feed-forward width f, L layers, vocabulary rows V and samples of n_i tokens:

    - encoder weights: query, key, value, output h*h each, feed-forward h*f twice (ModernBERT, gated: three times):
      N = L * (4*h*h + 2*h*f), hence 6 * N per token (`lengths_sum` tokens); the last layer's output and feed-forward
      weights (ModernBERT: feed-forward alone) count for masked tokens and a [CLS] per pair only (model/last_layer.py);
    - attention: scores Q K^T over all heads are 2 * n_i^2 * h forward, the weighted values as much again: 4, and 12
      with the backward pass, hence 12 * L * h * sum(n_i^2) (`lengths_squared_sum`). ModernBERT's local layers see 129
      tokens at most: there sum(n_i^2) counts as no more than 129 * sum(n_i);
    - MLM head, on masked positions only: transform h*h and decoder h*V, hence 6 * (h*h + h*V) each;
    - pooler and NSP, per pair: h*h and 2*h, hence 6 * (h*h + 2*h).

    Embedding look-ups, norms, softmax and recomputation are not counted: the figure is model FLOPs (Chowdhery et al.
    2022, appendix B), so MFU = training_flops / seconds / peak.
    """
    h, layers = model.hidden_size, model.num_layers
    gated, extra = model.architecture.is_gated, model.extra or {}
    feed_forward = (3 if gated else 2) * h * model.intermediate_size
    weights = layers * (4 * h * h + feed_forward)
    unread = lengths_sum - min(lengths_sum, masked + pairs)
    left_out = 6.0 * unread * (feed_forward if gated else feed_forward + h * h)
    global_layers = -(-layers // int(extra.get("global_attn_every_n_layers", GLOBAL_EVERY))) if gated else layers
    seen = int(extra.get("local_attention", LOCAL_ATTENTION)) + 1
    local_pairs = min(lengths_squared_sum, seen * lengths_sum)
    attended = global_layers * lengths_squared_sum + (layers - global_layers) * local_pairs
    encoder = 6.0 * weights * lengths_sum + 12.0 * h * attended - left_out
    return encoder + 6.0 * masked * (h * h + h * vocab_rows) + 6.0 * pairs * (h * h + 2 * h)


class Throughput:
    """Rates between two log lines. Counts are global sums over ranks; `pause` keeps evaluations out of the time."""

    def __init__(self, peak_flops_total: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._peak, self._clock = peak_flops_total, clock
        self._start = clock()
        self._clear()

    def _clear(self) -> None:
        self._steps, self._tokens, self._samples, self._row_tokens = 0, 0, 0, 0
        self._flops, self._paused_seconds = 0.0, 0.0

    def add(self, *, tokens: int, samples: int, row_tokens: int, flops: float = 0.0) -> None:
        """Count one step; `row_tokens` are the real ones and those that fill up rows."""
        self._steps += 1
        self._tokens += tokens
        self._samples += samples
        self._row_tokens += row_tokens
        self._flops += flops

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - start

    def read(self, ranks: Sequence["RankWork"]) -> dict[str, float]:
        """Rates since the last `read`, and the extremes over ranks; the next window starts here."""
        now = self._clock()
        seconds = max(now - self._start - self._paused_seconds, 1e-9)
        steps, work = max(1, self._steps), [rank.seconds for rank in ranks]
        rates = {
            "throughput/tokens_per_second": self._tokens / seconds,
            "throughput/samples_per_second": self._samples / seconds,
            "data/wait_fraction": min(1.0, max(rank.wait_seconds for rank in ranks) / seconds),
            "data/padding_fraction": 1.0 - self._tokens / max(1, self._row_tokens),
            "time/step_seconds": seconds / steps,
            "time/work_min_seconds": min(work) / steps,
            "time/work_max_seconds": max(work) / steps,
            "time/slowest_rank": work.index(max(work)),
            "memory/peak_gib": max(rank.peak_gib for rank in ranks),
        }
        if self._peak is not None:
            rates["throughput/mfu"] = self._flops / seconds / self._peak
        self._start = now
        self._clear()
        return rates


class RankWork(NamedTuple):
    """What one rank did by itself in a window: in a collective all are as slow as the slowest."""

    seconds: float  # waiting for samples, and forward passes, which hold no collective (but under ZeRO 3)
    wait_seconds: float  # for samples
    peak_gib: float  # memory: allocated on the GPU, or resident on a CPU


class _HostEvent:
    """What `torch.cuda.Event` is for a GPU."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "_HostEvent") -> float:
        return (end._seconds - self._seconds) * 1e3


class Stopwatch:
    """This rank's own work, by the GPU's clock where there is one; marks are read later, so the host never waits."""

    def __init__(self, device: "torch.device") -> None:
        import torch  # here: who only counts FLOPs does without

        self._cuda = device.type == "cuda"
        self._new_event: Callable[[], Any] = partial(torch.cuda.Event, enable_timing=True) if self._cuda else _HostEvent
        self._marks: list[Any] = []
        self._waited = 0.0

    def mark(self) -> None:
        """Called in turns where work begins and where it ends."""
        event = self._new_event()
        event.record()
        self._marks.append(event)

    def waited(self, seconds: float) -> None:
        """Count the wait for samples."""
        self._waited += seconds

    def read(self) -> RankWork:
        """Since the last `read`, which is where the device has done all that was asked of it."""
        forward = sum(begin.elapsed_time(end) for begin, end in zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        work = RankWork(self._waited + forward / 1e3, self._waited, peak / 2**30)
        self._marks, self._waited = [], 0.0
        return work
