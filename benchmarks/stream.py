"""What streaming costs and what its shuffle is worth: `python benchmarks/stream.py [--corpus DIR]`.

Latency: a trainer that takes `--step` seconds for each micro-batch reads the corpus from a local web server which
answers each request after 50 ms, with windows fetched ahead and without, beside `mapped` from the disk. Printed is the
share of time in which it waits for a micro-batch; building one counts, since no loader process hides it here.

Shuffle: one epoch's order by `mapped` and by `stream`, and by webdataset's own shuffle with a buffer of as many samples
as all lanes' windows hold (shards permuted first, as its users do). Against the order on disk: rank correlation, mean
displacement (1/3 of the corpus for a perfect shuffle), and the share of a batch's samples that lie in the corpus beside
another one of the batch. Means over seeds.
"""

import argparse
import functools
import http.server
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from webdataset.filters import _shuffle

from data_prep.manifest import Manifest, pass_name, read_manifest
from pretrain.loader import Layout, MicroBatches, Streaming
from pretrain.order import sample_at
from pretrain.stream import Streamed
from tests.support import make_corpus

LATENCY_SECONDS = 0.05
BATCH = 256
I64 = npt.NDArray[np.int64]


class Slow(http.server.SimpleHTTPRequestHandler):
    """Byte ranges, each answer `LATENCY_SECONDS` late."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(LATENCY_SECONDS)
        first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        with Path(self.translate_path(self.path)).open("rb") as file:
            file.seek(first)
            part = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def served(corpus: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=str(corpus))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Late(Streamed):
    """Without prefetch: a window is asked for when its first sample is needed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pool.shutdown()
        vars(self)["_pool"] = Inline()


class Inline:
    """An executor that runs a call when its result is wanted."""

    def submit(self, call: Any, *arguments: Any) -> Any:
        class Wanted(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                return call(*arguments)

        return Wanted()


def wait_share(corpus: Path, streaming: Streaming | None, step: float, *, ahead: bool = True) -> float:
    """Share of an epoch's time in which the trainer waits for a micro-batch; its first one is not counted."""
    size = 64
    dataset = MicroBatches(corpus, 1, Layout(0, 1, size, size), 0, streaming)
    dataset[0]
    if not ahead:
        assert streaming
        assert dataset._corpus
        dataset._corpus._streamed = Late(streaming.source, read_manifest(corpus), 1, *streaming[1:])
        dataset[0]
    samples = read_manifest(corpus).splits[pass_name(0)].samples
    waited, start = 0.0, time.perf_counter()
    for index in range(1, samples // size):
        before = time.perf_counter()
        dataset[index]
        waited += time.perf_counter() - before
        time.sleep(step)  # the training step
    return waited / (time.perf_counter() - start)


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
        with served(corpus) as url:
            streaming = Streaming(url, arguments.lanes, arguments.window)
            for label, source, ahead in (
                ("stream", streaming, True),
                ("no_prefetch", streaming, False),
                ("mapped", None, True),
            ):
                share = wait_share(corpus, source, arguments.step, ahead=ahead)
                results[f"wait_fraction_{label}"] = share
                print(f"waiting for data ({label}; streams are 50 ms away): {share:.1%}")
        results["shuffle"] = shuffles(corpus, arguments.lanes, arguments.window, arguments.seeds)
    for kind, row in results["shuffle"].items():
        print(f"{kind:>10}: " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
