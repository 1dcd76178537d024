"""Loader throughput beside its peers, on the same samples in one process: `python benchmarks/loader.py [--corpus DIR]`.

Ours builds packed micro-batches with live masks (draw 1: nothing baked) as a loader process does, many at a time. What
reading alone costs where no block is in the reader's cache, as with corpora far larger than that, is told apart. Peers
build padded batches: Hugging Face's `DataCollatorForLanguageModeling` from lists of ids, and that collator behind plain
`webdataset` over tars with one member per sample, behind MosaicML's `streaming` and behind `litdata`, each over its own
format on the disk; the last two where they are installed (`pip install mosaicml-streaming litdata`, into an environment
of their own: they pull much). Rounds alternate, so that a drift of the machine meets all; the medians and their ratios
are printed and written as JSON.

At last BERT-tiny trains on this machine's CPU with one loader process, and the share of time is told in which it waited
for samples.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, logging

from cloze.corpus.manifest import pass_name, read_manifest
from cloze.corpus.masking import Masking
from cloze.corpus.shards import Split
from pretrain.data.loader import CHUNK_SAMPLES, Layout, MicroBatches, TrainingCorpus
from tests.support import make_corpus

MICRO_BATCHES = (32, 64, 256)
BAR = 25.0  # times the collator, at 128 tokens


def tokenizer_of(corpus: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(corpus / "tokenizer" / "tokenizer.json"),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def as_lists(corpus: Path, count: int) -> list[dict[str, list[int]]]:
    split = Split(corpus, read_manifest(corpus), pass_name(0))
    samples = split.gather(np.arange(min(count, len(split))), 99)
    ends = np.cumsum(samples.lengths_Nx2[:, 1], dtype=np.int64)
    rows = []
    for end, (first, total) in zip(ends.tolist(), samples.lengths_Nx2.tolist(), strict=True):
        ids = samples.tokens_T[end - total : end].tolist()
        rows.append({"input_ids": ids, "token_type_ids": [int(i >= first) for i in range(total)]})
    return rows


def one_member_tars(rows: list[dict[str, list[int]]], folder: Path) -> str:
    path = folder / "one-member.tar"
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number, row in enumerate(rows):
            tar.write({"__key__": f"{number:08d}", "json": row})
    return str(path)


def as_arrays(rows: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    kinds = {"input_ids": np.uint16, "token_type_ids": np.uint8}
    return [{key: np.asarray(row[key], kind) for key, kind in kinds.items()} for row in rows]


def mosaic_shards(rows: list[dict[str, list[int]]], folder: Path) -> Iterable[dict[str, Any]]:
    """MosaicML's own format. Its package imports torchvision, which may not fit this torch: what is needed does not."""
    package = types.ModuleType("streaming")
    found = importlib.util.find_spec("streaming")
    assert found
    package.__path__ = list(found.submodule_search_locations or [])
    package.__spec__ = found
    sys.modules["streaming"] = package
    from streaming.base import MDSWriter, StreamingDataset

    columns = {"input_ids": "ndarray:uint16", "token_type_ids": "ndarray:uint8"}
    with MDSWriter(out=str(folder / "mosaic"), columns=columns) as writer:
        for row in as_arrays(rows):
            writer.write(row)
    dataset: Iterable[dict[str, Any]] = StreamingDataset(local=str(folder / "mosaic"), shuffle=False, batch_size=1)
    return dataset


def lit_chunks(rows: list[dict[str, list[int]]], folder: Path) -> Iterable[dict[str, Any]]:
    """litdata's, by its writer: its `optimize` starts this script again where a main guard is missing."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    (folder / "lit").mkdir()
    writer = BinaryWriter(str(folder / "lit"), chunk_bytes="64MB")
    for number, row in enumerate(as_arrays(rows)):
        writer[number] = row
    writer.done()
    writer.merge()
    dataset: Iterable[dict[str, Any]] = StreamingDataset(str(folder / "lit"))
    return dataset


def rate(build: Callable[[], object], samples: int) -> float:
    """Samples per second of CPU time: other users of the machine do not count."""
    start = time.process_time()
    build()
    return samples / (time.process_time() - start)


def measure(corpus: Path, size: int, rounds: int) -> dict[str, list[float]]:
    opened = TrainingCorpus(corpus)
    epoch = sum(opened.pass_sizes)
    layout = Layout(rank=0, world_size=1, micro_batch_size=size, global_batch_size=size)
    dataset = MicroBatches(corpus, 1, layout, epoch * max(1, opened.manifest.baked_draws))
    rows = as_lists(corpus, 4096)
    collator = DataCollatorForLanguageModeling(tokenizer_of(corpus), mlm_probability=0.15)

    def packed(samples: int) -> None:
        chunk = max(1, CHUNK_SAMPLES // size)
        for start in range(0, samples // size, chunk):
            dataset.__getitems__(range(start, start + chunk))

    def padded(source: Iterable[dict[str, list[int]]]) -> None:
        items = islice(source, 2048)  # once: litdata starts over
        while batch := list(islice(items, size)):
            collator(batch)

    packed(epoch // CHUNK_SAMPLES * CHUNK_SAMPLES)  # every block is open: a long run's steady state
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tar = one_member_tars(rows[:2048], Path(folder))
        plain = webdataset.WebDataset(tar, shardshuffle=False).decode()
        others: dict[str, Iterable[dict[str, Any]]] = {}
        for peer, module, write in (("mosaic", "streaming", mosaic_shards), ("litdata", "litdata", lit_chunks)):
            if importlib.util.find_spec(module):
                others[peer] = write(rows[:2048], Path(folder))
        for _ in range(rounds):
            rates = {
                "cloze": rate(lambda: packed(16_384), 16_384),
                "collator": rate(lambda: padded(rows[:2048]), 2048),
                "webdataset": rate(lambda: padded(sample["json"] for sample in plain), 2048),
                **{peer: rate(lambda items=items: padded(items), 2048) for peer, items in others.items()},
            }
            for peer, value in rates.items():
                found.setdefault(peer, []).append(value)
    return found


def cold(corpus: Path, rounds: int) -> float:
    """Samples read per second, in random order, where each needs its block opened anew."""
    split = Split(corpus, read_manifest(corpus), pass_name(0), cached_blocks=0)
    order = np.random.default_rng(0).permutation(len(split))[:4096]
    split.gather(np.arange(len(split)), 99)  # every checksum was checked once
    return statistics.median(rate(lambda: split.gather(order, 99), len(order)) for _ in range(rounds))


def wait_fraction(corpus: Path, steps: int) -> float:
    """Share of time in which a real run waits for samples, after the first tenth, in which its loader starts.

    One core is left to the loader process, as our launcher leaves it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1))}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"data.path={corpus}", f"runs_root={folder}", "run=r", "model=tiny", "zero=0", "precision=fp32",
            "global_batch_size=64", "micro_batch_size=32", f"steps={steps}", f"log.every={steps // 10}", "eval.every=0",
            "checkpoint.every=0", "wandb.mode=disabled",
        ]  # fmt: skip
        command = [sys.executable, "-m", "pretrain.train", *overrides]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
        lines = [json.loads(line) for line in (Path(folder) / "r" / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(line["data/wait_fraction"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a prepared corpus; default: random ones of 128 and 512 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of the run whose wait for samples is told; 0: none")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    logging.set_verbosity_error()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        corpora = {str(arguments.corpus): arguments.corpus} if arguments.corpus else {}
        for max_len in () if arguments.corpus else (128, 512):
            path = corpora[f"{max_len} tokens"] = Path(folder) / str(max_len)
            masking = Masking(strategy="token", probability=0.15, max_predictions=max_len // 6, seed=1)
            path.mkdir()
            make_corpus(
                path, samples=20_000, max_len=max_len, vocab_size=30_522, masking=masking, samples_per_block=256
            )
        for (name, corpus), size in product(corpora.items(), MICRO_BATCHES):
            found = measure(corpus, size, arguments.rounds)
            row = {peer: statistics.median(values) for peer, values in found.items()}
            ratios = {
                f"times_{peer}": statistics.median(a / b for a, b in zip(found["cloze"], values, strict=True))
                for peer, values in found.items()
                if peer != "cloze"
            }
            results[f"{name}, micro-batch {size}"] = row | ratios
            print(f"{name}, micro-batch {size}: " + "  ".join(f"{peer} {value:,.0f}/s" for peer, value in row.items()))
            print("  " + "  ".join(f"{value:.1f} {peer.replace('_', ' ')}" for peer, value in ratios.items()))
        for name, corpus in corpora.items():
            results[f"{name}, no block in the cache"] = {"cloze": cold(corpus, arguments.rounds)}
            print(f"{name}, samples read with no block in the cache: {results[f'{name}, no block in the cache']}")
        for name, corpus in corpora.items() if arguments.steps else ():
            share = wait_fraction(corpus, arguments.steps)
            results[f"{name}, BERT-tiny trains"] = {"wait_fraction": share}
            print(f"{name}, BERT-tiny trains on this CPU: it waits for samples {share:.2%} of the time")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
