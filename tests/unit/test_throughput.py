"""Model FLOPs against torch's counter, meters against a clock of our own."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Architecture
from pretrain.model.architectures import blueprint_of
from pretrain.model.bert import PackedBert
from pretrain.telemetry.throughput import RankWork, Stopwatch, Throughput, peak_flops, training_flops
from tests.support import tokenizer_facts
from tests.unit.test_attention import row_of
from tests.unit.test_model import small


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize(("lengths", "vocab_rows"), [([2], 30), ([7, 20, 3], 61)])
def test_training_flops_are_those_torch_counts(lengths: list[int], vocab_rows: int, architecture: Architecture) -> None:
    """Every sample alone through Hugging Face's model, whose head runs on all positions: masked = tokens."""
    model = small(architecture=architecture, num_layers=4, intermediate_size=48)
    reference = blueprint_of(model.architecture).build(model, tokenizer_facts(vocab_rows), vocab_rows)
    reference.set_attn_implementation("eager")
    with_pairs = architecture is Architecture.bert
    pairs = {"next_sentence_label": torch.zeros(1, dtype=torch.long)} if with_pairs else {}
    with FlopCounterMode(display=False) as counter:
        for length in lengths:
            ids = torch.ones(1, length, dtype=torch.long)
            reference(input_ids=ids, labels=ids, **pairs).loss.backward()
    squares = sum(n * n for n in lengths)
    ours = training_flops(model, vocab_rows, sum(lengths), squares, sum(lengths), len(lengths) if with_pairs else 0)
    assert ours == counter.get_total_flops()


@pytest.mark.parametrize("architecture", Architecture)
def test_the_last_layer_counts_for_what_is_read(architecture: Architecture) -> None:
    """Against torch's count of the packed model; its attention is left out by a difference of two batches."""
    model = small(architecture=architecture, num_layers=2, intermediate_size=48)
    module = PackedBert(model, tokenizer_facts(61), max_len=40).train()
    row = row_of([30, 10], torch.device("cpu"))
    pairs = 2 if architecture is Architecture.bert else 0

    def counts(masked: int) -> tuple[float, float]:
        batch = row._replace(masked_index_M=torch.arange(1, masked + 1), nsp_labels_N=torch.zeros(2, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            mlm, nsp = module(batch)
            (mlm.sum() + nsp.sum()).backward()
        return counter.get_total_flops(), training_flops(model, module.vocab_rows, 40, 1000, masked, pairs)

    (many, our_many), (few, our_few) = counts(20), counts(3)
    assert our_many - our_few == many - few


def test_local_attention_counts_its_window_only() -> None:
    model = small(architecture=Architecture.modernbert, num_layers=3, max_positions=2000)
    long, short = (training_flops(model, 61, n, n * n, 0, 0) for n in (1000, 100))
    per_pair = 12.0 * model.hidden_size
    weights = 6.0 * (
        3 * 4 * 32 * 32 + 2 * 3 * 32 * 64
    )  # nothing is read: the last layer's feed-forward part is not run
    assert long == weights * 1000 + per_pair * (1000**2 + 2 * 1000 * 129)
    assert short == weights * 100 + per_pair * 3 * 100**2


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA B200", 2250.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def work(seconds: float = 0.0, wait: float = 0.0, peak: float = 0.0) -> RankWork:
    return RankWork(seconds, wait, peak)


def test_throughput_counts_windows_and_leaves_pauses_out() -> None:
    now = [0.0]
    meter = Throughput(100.0, clock=lambda: now[0])
    meter.add(tokens=50, samples=5, row_tokens=70, flops=300.0)
    now[0] = 4.0
    with meter.pause():
        now[0] = 100.0
    meter.add(tokens=50, samples=5, row_tokens=130, flops=100.0)
    ranks = [work(1.0, 0.5, 2.0), work(3.0, 1.0, 1.0), work(2.0)]
    assert meter.read(ranks) == {
        "throughput/tokens_per_second": 25.0,
        "throughput/samples_per_second": 2.5,
        "throughput/mfu": 1.0,
        "data/wait_fraction": 0.25,
        "data/padding_fraction": 0.5,
        "time/step_seconds": 2.0,
        "time/work_min_seconds": 0.5,
        "time/work_max_seconds": 1.5,
        "time/slowest_rank": 1,
        "memory/peak_gib": 2.0,
    }
    now[0] = 101.0
    meter.add(tokens=7, samples=1, row_tokens=7)
    assert meter.read([work()])["throughput/tokens_per_second"] == 7.0
    assert "throughput/mfu" not in Throughput(None).read([work()])


def test_stopwatch_adds_spans_and_waits() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        stopwatch.mark()
        time.sleep(0.02)
        stopwatch.mark()
        time.sleep(0.05)  # between spans: not its work
    stopwatch.waited(7.0)
    found = stopwatch.read()
    assert 7.04 <= found.seconds < 7.5
    assert found.wait_seconds == 7.0
    assert 0.05 < found.peak_gib < 100
    assert stopwatch.read().seconds == 0.0
