"""How long a save keeps training waiting, beside DeepSpeed's own: `python benchmarks/checkpoint.py --model base large`.

Two ranks on this machine, ZeRO 1, bf16. The same engine saves the same state in turns: ours (blocking: the copy of each
rank's share to the CPU; total: until the checkpoint is whole, hashed and renamed) and `save_checkpoint` (blocking is
total: it returns when it is done, without checksums). Medians over rounds and their ratio, also as JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cloze import cli
from cloze.corpus.manifest import TokenizerFacts
from pretrain import dist
from pretrain.checkpoint import LossScale, Retention, TrainingState, Writer, WriterOptions
from pretrain.config import TrainConfig
from pretrain.data.loader import TrainingCorpus
from pretrain.engine.engine import Engine
from pretrain.model.bert import PackedBert
from tests.support import free_port, make_corpus, make_identity, rank_environment

RANKS = 2
VOCAB = 30_522


def worker(model: str, corpus: Path, folder: Path, rounds: int) -> None:
    overrides = [
        f"model={model}", "zero=1", "precision=bf16", "run=bench", f"data.path={corpus}", "global_batch_size=2",
        "micro_batch_size=1",
    ]  # fmt: skip
    config = cli.compose("train", TrainConfig, overrides)
    process = dist.start()
    facts = TokenizerFacts(fingerprint="0" * 64, vocab_size=VOCAB, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
    torch.manual_seed(1)
    engine = Engine(PackedBert(config.model, facts, max_len=128), config, process)
    sample = TrainingCorpus(corpus).sample_batch()
    engine.backward(sample, lambda logits, _: logits[0].float().mean() + logits[1].float().mean())
    engine.step(1e-4)
    writer = Writer(
        folder / "ours",
        WriterOptions(rank=process.rank, num_writers=RANKS, retention=Retention(keep_last=1), patience_seconds=600),
        print,
    )
    found: dict[str, list[float]] = {"blocking": [], "total": [], "deepspeed": []}
    for number in range(rounds + 1):  # the first is a warm-up
        state = TrainingState(
            step=number, samples=0, tokens=0, seconds=0.0, optimizer_steps=1, rollbacks=0, loss_scale=LossScale(),
            identity=make_identity(), wandb_id=None,
        )  # fmt: skip
        process.barrier()
        start = time.perf_counter()
        writer.submit(state, engine.fragments(), engine.shapes, "{}\n")
        found["blocking"].append(time.perf_counter() - start)
        writer.wait()
        process.barrier()
        found["total"].append(time.perf_counter() - start)
        start = time.perf_counter()
        engine._deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="x")
        found["deepspeed"].append(time.perf_counter() - start)
        process.barrier()
        if process.is_main:
            shutil.rmtree(folder / "deepspeed")
    if process.is_main:
        (folder / "found.json").write_text(json.dumps({name: values[1:] for name, values in found.items()}))
    writer.close()
    dist.finish()


def measure(model: str, corpus: Path, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        command = [sys.executable, __file__, "--worker", model, str(corpus), name, "--rounds", str(rounds)]
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | rank_environment(rank, RANKS, port) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
                stderr=subprocess.PIPE if rank else None,
            )
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.communicate()
            if rank.returncode:
                sys.exit(f"{model}: a rank ended with {rank.returncode}")
        found = json.loads((folder / "found.json").read_text())
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["blocking"], found["deepspeed"], strict=True))
    return {**medians, "blocking_over_deepspeed": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["base"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        model, corpus, folder = arguments.worker
        worker(model, Path(corpus), Path(folder), arguments.rounds)
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "corpus").mkdir()
        make_corpus(Path(name) / "corpus", samples=64)
        for model in arguments.model:
            row = results[model] = measure(model, Path(name) / "corpus", arguments.rounds)
            print(
                f"{model}: training waits {row['blocking']:.2f} s (whole after {row['total']:.2f} s); DeepSpeed's own "
                f"save {row['deepspeed']:.2f} s; ratio {row['blocking_over_deepspeed']:.2f}"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
