"""What a run needs of the network, and how it scales: `PYTHONPATH=. python benchmarks/scaling.py`.

Two gloo ranks train a small model under each ZeRO stage while every collective of torch.distributed is counted: that
gives the bytes per parameter and step, for one micro-batch a step and for two. A model of rings (below) then turns them
into efficiencies of clusters that we do not have. Tables on stdout, JSON into benchmarks/results/scaling.json.

The model: a collective of S bytes over n ranks takes S (n-1)/n / B + nodes x LATENCY, where B is the narrowest of what
a node sends to the next and NVLink. What DeepSpeed overlaps (gradients with the backward pass; at stage 3 everything
with both passes) counts only as far as it outlasts the computation. All figures below in capitals are assumptions.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from cloze.corpus.manifest import NAME as MANIFEST_NAME
from pretrain.data.loader import TrainingCorpus
from tests.support import Trainer, make_corpus

RESULTS = Path(__file__).parent / "results" / "scaling.json"
STAGES = (1, 2, 3)
GPUS = (8, 64, 256, 1024)

GPUS_PER_NODE = 8
NVLINK = 370e9  # bytes/s: what NCCL reaches of H200's 450 GB/s a direction
NETWORKS = {"NVLink + 8 x 400 Gb/s": 8 * 50e9 * 0.85, "25 Gb/s Ethernet": 25e9 / 8 * 0.85}  # bytes/s out of a node
LATENCY = 10e-6  # seconds for each node that a collective passes
BUCKET = 200_000_000  # parameters a collective, at most (pretrain/engine/engine.py)
FLOPS = 989e12 * 0.45  # a GPU's, at the bar for MFU
TOKENS = 128  # of a sample
MICRO_BATCH = 256  # samples a GPU takes at once, at most
BACKWARD = 2 / 3  # of the time of a micro-batch


class Model(NamedTuple):
    name: str
    parameters: float
    global_batch: int  # samples of TOKENS tokens


MODELS = (Model("base", 110e6, 4096), Model("large", 335e6, 65_536))

COUNT = """
import atexit, os, torch
from collections import Counter
import torch.distributed as d
counts, steps = Counter(), [0]
def wrap(name):
    real = getattr(d, name)
    def counted(*args, **kwargs):
        sizes = [t.numel() * t.element_size() for t in (*args, *kwargs.values())
                 if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64]
        counts[name] += max(sizes, default=0)
        return real(*args, **kwargs)
    setattr(d, name, counted)
for name in ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor"):
    wrap(name)
def report():
    if os.environ["RANK"] == "0":
        print("counted", __import__("json").dumps(counts), flush=True)
atexit.register(report)
"""


def counted(trainer: Trainer, corpus: Path, stage: int, micro_batches: int, steps: int) -> tuple[dict[str, int], int]:
    """Bytes by collective of a run of so many steps, and the model's parameters."""
    result = trainer.run(
        f"data.path={corpus}", f"zero={stage}", "precision=bf16", "micro_batch_size=4", f"steps={steps}",
        f"global_batch_size={8 * micro_batches}", ranks=2, before=COUNT,
    )  # fmt: skip
    assert result.codes == (0, 0), result.stderrs
    printed = (result.run.parent / "stdout-0").read_text().splitlines()
    (line,) = (line for line in printed if line.startswith("counted "))
    weights = load_file(result.run / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")
    return json.loads(line.removeprefix("counted ")), sum(tensor.numel() for tensor in weights.values())


class Traffic(NamedTuple):
    """Bytes per parameter: gradients and weights, of a step whatever its micro-batches and of each micro-batch."""

    gradients_step: float
    gradients_micro: float
    weights_step: float
    weights_micro: float


def traffic(trainer: Trainer, corpus: Path, stage: int) -> Traffic:
    """Measured on two ranks: the first steps are left out, in which weights are spread."""
    rates = []
    for micro_batches in (1, 2):
        few, many = (counted(trainer, corpus, stage, micro_batches, steps) for steps in (2, 6))
        rates.append({name: (many[0][name] - few[0].get(name, 0)) / 4 / many[1] for name in many[0]})
    for number, rate in enumerate(rates, 1):
        shown = ", ".join(f"{name} {value:.2f}" for name, value in sorted(rate.items()) if value > 0.01)
        print(f"ZeRO {stage}, {number} micro-batches a step, bytes per parameter: {shown}")
    one, two = ({"weights": rate["all_gather_into_tensor"], "all": sum(rate.values())} for rate in rates)
    gradients = (one["all"] - one["weights"], two["all"] - two["weights"])
    return Traffic(
        2 * gradients[0] - gradients[1],
        gradients[1] - gradients[0],
        2 * one["weights"] - two["weights"],
        two["weights"] - one["weights"],
    )


def seconds_of(size: float, gpus: int, outward: float) -> float:
    """Of a reduce-scatter or an all-gather of `size` bytes; an all-reduce is one of each."""
    nodes = gpus // GPUS_PER_NODE
    bandwidth = NVLINK if nodes == 1 else min(NVLINK, outward)
    collectives = math.ceil(size / (2 * BUCKET))
    return size * (gpus - 1) / gpus / bandwidth + collectives * nodes * LATENCY


def efficiency(model: Model, stage: int, measured: Traffic, gpus: int, outward: float) -> float:
    """Share of a step in which the GPUs compute, at the model's fixed global batch (strong scaling)."""
    share = model.global_batch / gpus
    micro = min(share, MICRO_BATCH)
    micro_batches = share / micro
    compute = micro * TOKENS * 6 * model.parameters / FLOPS
    ways = 1 if stage == 3 else 2  # stages 1 and 2 all-reduce: twice the way of a reduce-scatter
    reduce_micro = ways * seconds_of(model.parameters * measured.gradients_micro, gpus, outward)
    reduce_step = ways * seconds_of(model.parameters * measured.gradients_step, gpus, outward)
    gathers = measured.weights_micro
    if stage == 3 and model.parameters > BUCKET:  # not all weights stay: at worst they come again for both passes
        gathers = 4.0
    gather_micro = seconds_of(model.parameters * gathers, gpus, outward)
    gather_step = seconds_of(model.parameters * measured.weights_step, gpus, outward)
    window = compute if stage == 3 else compute * BACKWARD
    exposed = micro_batches * max(0.0, reduce_micro + gather_micro - window) + max(0.0, reduce_step - window)
    return micro_batches * compute / (micro_batches * compute + exposed + gather_step)


def opening(folder: Path) -> dict[str, float]:
    """What a rank reads and keeps to open a corpus."""
    folder.mkdir()
    manifest = make_corpus(folder, samples=20_000, val=500, samples_per_block=256)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        TrainingCorpus(folder)
        seconds.append(time.perf_counter() - start)
    blocks = sum(len(shard.blocks.samples) for shard in manifest.shards)
    size = (folder / MANIFEST_NAME).stat().st_size
    return {"manifest_bytes_per_block": size / blocks, "open_seconds_per_block": statistics.median(seconds) / blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        (folder / "runs").mkdir()
        make_corpus(folder / "corpus")
        trainer = Trainer(folder / "runs")
        measured = {stage: traffic(trainer, folder / "corpus", stage) for stage in STAGES}
        trainer.close()
        opened = opening(folder / "many")
    rows = []
    for network, outward in NETWORKS.items():
        print(f"\n{network}: efficiency\n{'':14}" + "".join(f"{gpus:>8}" for gpus in GPUS))
        for model in MODELS:
            for stage, bytes_ in measured.items():
                values = [efficiency(model, stage, bytes_, gpus, outward) for gpus in GPUS]
                print(f"{model.name:6} ZeRO {stage}  " + "".join(f"{value:8.0%}" for value in values))
                rows.append({"network": network, "model": model.name, "stage": stage, "efficiency": values})
    print("\nto open a corpus, per block of 256 samples: {manifest_bytes_per_block:.0f} bytes of manifest, "
          "{open_seconds_per_block:.2e} s".format(**opened))  # fmt: skip
    bytes_per_parameter = {stage: found._asdict() for stage, found in measured.items()}
    result = {"gpus": GPUS, "bytes_per_parameter": bytes_per_parameter, "rows": rows, **opened}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
