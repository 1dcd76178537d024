"""What streaming costs and what its shuffle is worth: `python benchmarks/stream.py [--corpus DIR]`.

Latency: a trainer that takes `--step` seconds for each micro-batch reads two epochs through a loader process, as a run
does, from a local web server that answers at once, from one that answers each request after 50 ms, and mapped from the
disk. Printed is the share of time in which it waits for a micro-batch, after the first one, and the longest wait: the
difference between the two servers is what latency costs.

Shuffle: one epoch's order by `mapped` and by `stream`, and by webdataset's own shuffle with a buffer of as many samples
as all lanes' windows hold (shards permuted first, as its users do). Against the order on disk: rank correlation, mean
displacement (1/3 of the corpus for a perfect shuffle), and the share of a batch's samples that lie in the corpus beside
another one of the batch. Means over seeds.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from webdataset.filters import _shuffle

from cloze.corpus.manifest import Manifest, pass_name, read_manifest
from pretrain.data.loader import Layout, MicroBatches, Streaming, training_steps
from pretrain.data.order import sample_at
from pretrain.data.stream import Streamed
from tests.support import make_corpus, served

LATENCY_SECONDS = 0.05
BATCH = 256
I64 = npt.NDArray[np.int64]


def waiting(corpus: Path, streaming: Streaming | None, step_seconds: float) -> dict[str, float]:
    """Share of two epochs' time in which the trainer waits for a micro-batch, and the longest wait."""
    size = 64
    dataset = MicroBatches(corpus, 1, Layout(0, 1, size, size), 0, streaming)
    count = 2 * read_manifest(corpus).splits[pass_name(0)].samples // size
    steps = training_steps(dataset, steps=count, workers=1, prefetch=8, pin_memory=False)
    next(steps)
    waits, start = [], time.perf_counter()
    while True:
        before = time.perf_counter()
        if next(steps, None) is None:
            break
        waits.append(time.perf_counter() - before)
        time.sleep(step_seconds)
    return {"wait_fraction": sum(waits) / (time.perf_counter() - start), "longest_seconds": max(waits)}


def places(manifest: Manifest, ids: I64) -> I64:
    """Where in the corpus the samples with these ids lie."""
    starts, total = {}, 0
    for shard in manifest.split_shards(pass_name(0)):
        starts[shard.id] = total
        total += shard.samples
    return np.asarray([starts[i >> 32] + (i & 0xFFFFFFFF) for i in ids.tolist()])


def by_stream(corpus: Path, manifest: Manifest, seed: int, lanes: int, window: int) -> I64:
    stream = Streamed(str(corpus), manifest, seed, lanes, window)
    size = manifest.splits[pass_name(0)].samples
    return places(manifest, np.concatenate([part.ids_N for part, _ in stream.gather(np.arange(size))]))


def by_webdataset(manifest: Manifest, seed: int, buffer: int) -> I64:
    rng, start, stretches = random.Random(seed), 0, []
    for shard in manifest.split_shards(pass_name(0)):
        stretches.append(range(start, start + shard.samples))
        start += shard.samples
    rng.shuffle(stretches)
    samples = (sample for stretch in stretches for sample in stretch)
    return np.asarray(list(_shuffle(samples, bufsize=buffer, initial=buffer, rng=rng)))


def quality(order: I64) -> dict[str, float]:
    positions = np.arange(len(order))
    whole = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    gaps = np.diff(np.sort(whole, axis=1), axis=1) == 1
    beside = np.pad(gaps, ((0, 0), (1, 0))) | np.pad(gaps, ((0, 0), (0, 1)))
    return {
        "rank_correlation": abs(float(np.corrcoef(positions, order)[0, 1])),
        "mean_displacement": float(np.abs(order - positions).mean() / len(order)),
        "neighbours_in_batch": float(beside.mean()),
    }


def shuffles(corpus: Path, lanes: int, window: int, seeds: int) -> dict[str, dict[str, float]]:
    manifest = read_manifest(corpus)
    size = manifest.splits[pass_name(0)].samples
    found: dict[str, list[dict[str, float]]] = {"mapped": [], "stream": [], "webdataset": []}
    for seed in range(seeds):
        found["mapped"].append(quality(sample_at(seed, 0, np.arange(size), size)))
        found["stream"].append(quality(by_stream(corpus, manifest, seed, lanes, window)))
        found["webdataset"].append(quality(by_webdataset(manifest, seed, lanes * window)))
    return {kind: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for kind, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a prepared corpus; default: a random one of 32,768 samples")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--step", type=float, default=0.02, help="seconds of a training step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stream.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        corpus = arguments.corpus
        if corpus is None:
            corpus = Path(name) / "corpus"
            corpus.mkdir()
            make_corpus(corpus, samples=32_768, max_len=64, shards_per_split=32, samples_per_block=256)
        results: dict[str, Any] = {"lanes": arguments.lanes, "window": arguments.window, "step_seconds": arguments.step}
        for label, latency in (("stream, 0 ms", 0.0), ("stream, 50 ms", LATENCY_SECONDS), ("mapped", None)):
            with served(corpus, delay_seconds=latency or 0.0) as (url, _):
                streaming = Streaming((url,), arguments.lanes, arguments.window) if latency is not None else None
                results[label] = row = waiting(corpus, streaming, arguments.step)
            print(f"{label}: waits {row['wait_fraction']:.2%} of the time, at most {row['longest_seconds']:.3f} s")
        results["shuffle"] = shuffles(corpus, arguments.lanes, arguments.window, arguments.seeds)
    for kind, row in results["shuffle"].items():
        print(f"{kind:>10}: " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
