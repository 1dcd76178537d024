"""Loader throughput beside its peers, on the same samples in one process: `python benchmarks/loader.py [--corpus DIR]`.

Ours builds packed micro-batches with live masks (draw 1: nothing baked). Peers build padded batches: Hugging Face's
`DataCollatorForLanguageModeling` from lists of ids, and plain `webdataset` over tars with one member per sample plus
that collator. Rounds alternate, so that a drift of the machine meets all; the medians and their ratio are printed and
written as JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, logging

from data_prep.manifest import pass_name, read_manifest
from data_prep.masking import Masking
from data_prep.shards import Split
from pretrain.loader import Corpus
from tests.support import make_corpus

BATCH = 64
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


def rate(build: Callable[[int], object], batches: int) -> float:
    """Samples per second of CPU time: other users of the machine do not count."""
    start = time.process_time()
    for number in range(batches):
        build(number)
    return batches * BATCH / (time.process_time() - start)


def measure(corpus: Path, rounds: int) -> dict[str, list[float]]:
    ours = Corpus(corpus)
    epoch = sum(ours.pass_sizes)
    rows = as_lists(corpus, 20_000)
    collator = DataCollatorForLanguageModeling(tokenizer_of(corpus), mlm_probability=0.15)

    def packed(number: int) -> object:
        return ours.training_batch(1, epoch * max(1, ours.manifest.baked_draws) + np.arange(BATCH) + number * BATCH)

    def padded(number: int) -> object:
        start = number * BATCH % (len(rows) - BATCH)
        return collator(rows[start : start + BATCH])

    found: dict[str, list[float]] = {"cloze": [], "collator": [], "webdataset": []}
    for number in range(epoch // BATCH):
        packed(number)  # every block is open: a long run's steady state
    with tempfile.TemporaryDirectory() as folder:
        tar = one_member_tars(rows[:4096], Path(folder))
        for _ in range(rounds):
            found["cloze"].append(rate(packed, 400))
            found["collator"].append(rate(padded, 20))
            dataset = webdataset.WebDataset(tar, shardshuffle=False).decode().batched(BATCH, collation_fn=list)
            batches = iter(dataset)
            found["webdataset"].append(rate(lambda _, it=batches: collator([s["json"] for s in next(it)]), 20))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a prepared corpus; default: random ones of 128 and 512 tokens")
    parser.add_argument("--rounds", type=int, default=7)
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
        for name, corpus in corpora.items():
            found = measure(corpus, arguments.rounds)
            medians = {peer: statistics.median(values) for peer, values in found.items()}
            results[name] = medians
            print(f"{name}: " + "  ".join(f"{peer} {value:,.0f}/s" for peer, value in medians.items()))
            for peer in ("collator", "webdataset"):
                ratio = statistics.median(a / b for a, b in zip(found["cloze"], found[peer], strict=True))
                results[name][f"times_{peer}"] = ratio
                print(f"  {ratio:6.1f} times {peer}" + (f" (bar {BAR:.0f} at 128)" if peer == "collator" else ""))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
