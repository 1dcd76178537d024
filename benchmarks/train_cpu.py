"""Training on a CPU beside Hugging Face's Trainer: `python benchmarks/train_cpu.py --source books-small.jsonl.zst`.

The same samples of real text, the same model (BERT-mini, vocabulary 30,522, dropout 0.1), fp32, one thread:

- ours: the training command (zero=0: as unsharded as the peer), packed rows, MLM head on masked positions;
- peer: `Trainer` over `BertForPreTraining`, rows padded to the batch's longest, head on every position;
- bare: DeepSpeed's engine on the same micro-batches, ready-made, for what our loop (loading included) adds: 32 steps of
  each in one process, in turns of four.

Every round runs ours and the peer in processes of their own, in turns; figures are CPU seconds of the process (others
use the machine too) after warm-up steps; medians of the ratios. Also the share of the CPU's matmul peak.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cloze import cli
from pretrain import dist, train
from pretrain.config import TrainConfig
from pretrain.data.loader import IGNORED, MicroBatch, TrainingCorpus, bounded
from pretrain.engine.engine import Engine, StepResult
from pretrain.model.loss import pretraining_loss
from pretrain.session import Progress, build_engine
from pretrain.telemetry.throughput import training_flops

WARMUP, STEPS = 1, 3
TURNS, TURN_STEPS = 8, 4  # of the loop and of the bare engine, after one turn of each to warm up
BATCH = {128: 32, 512: 8}  # samples; about 4,000 tokens
BAR, OVERHEAD_BAR = 2.5, 0.03


def prepare(source: Path, out: Path, max_len: int) -> Path:
    if not (out / "manifest.json").exists():
        command = [
            sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{source}]", f"out={out}",
            f"max_len={max_len}", "tokenizer.vocab_size=30522", "executor.workers=1",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return out


def config_of(corpus: Path, folder: Path, model: str) -> TrainConfig:
    size = BATCH[TrainingCorpus(corpus).manifest.max_len]
    overrides = [
        f"model={model}", f"data.path={corpus}", f"runs_root={folder}", "run=bench", "zero=0", "precision=fp32",
        f"global_batch_size={size}", f"micro_batch_size={size}", f"steps={WARMUP + STEPS}", "data.workers=0",
        "eval.max_samples=4", "checkpoint.every=0", "log.every=1", "wandb.mode=disabled", "optim.clip=1",
    ]  # fmt: skip
    return cli.compose("train", TrainConfig, overrides)


class Clock:
    """CPU seconds of this process at each step's end."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.process_time())

    def seconds(self) -> float:
        """Of the steps after the warm-up."""
        return self.marks[WARMUP + STEPS - 1] - self.marks[WARMUP - 1]


def ours(corpus: Path, folder: Path, model: str) -> float:
    """Seconds of the training command itself."""
    clock, update = Clock(), Engine.step

    def step(self: Engine, lr: float) -> StepResult:
        result = update(self, lr)
        clock.mark()
        return result

    Engine.step = step
    assert train.main(config_of(corpus, folder, model)) == 0
    return clock.seconds()


class Rows(Dataset[dict[str, Tensor]]):
    """The run's samples in its order, as Hugging Face's collators want them."""

    def __init__(self, corpus: TrainingCorpus, seed: int, count: int) -> None:
        self.corpus, self.seed, self.count = corpus, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.corpus.training_batch(self.seed, np.asarray([index]))
        labels = torch.full_like(batch.input_ids_T, IGNORED)
        labels[batch.masked_index_M] = batch.mlm_labels_M
        return {
            "input_ids": batch.input_ids_T,
            "token_type_ids": batch.token_type_ids_T,
            "labels": labels,
            "next_sentence_label": batch.nsp_labels_N[0],
        }


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fillers = {"input_ids": 0, "token_type_ids": 0, "labels": IGNORED}
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {key: pad([row[key] for row in rows], True, filler) for key, filler in fillers.items()}
    ones = [torch.ones_like(row["input_ids"]) for row in rows]
    labels = torch.stack([row["next_sentence_label"] for row in rows])
    return batch | {"attention_mask": pad(ones, True, 0), "next_sentence_label": labels}


def peer(corpus: Path, folder: Path, model: str) -> float:
    """Seconds of Hugging Face's Trainer."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pretrain.model.bert import hugging_face_model

    config, data, clock = config_of(corpus, folder, model), TrainingCorpus(corpus), Clock()
    facts, size = data.manifest.tokenizer, config.micro_batch_size

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Marks(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.mark()

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, max_steps=WARMUP + STEPS, learning_rate=1e-4,
        weight_decay=0.01, max_grad_norm=1.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    InOrder(
        model=hugging_face_model(config.model, facts, vocab_rows=facts.vocab_size),
        args=arguments,
        train_dataset=Rows(data, config.seed, size * (WARMUP + STEPS)),
        data_collator=padded,
        callbacks=[Marks()],
    ).train()
    return clock.seconds()


def overhead(corpus: Path, folder: Path, model: str) -> float:
    """Share of time that our loop adds to DeepSpeed's engine on the same micro-batches: the median of turns."""
    config = config_of(corpus, folder, model)
    process = dist.start()
    data = TrainingCorpus(corpus)
    engine, rows = build_engine(config, data, process, None)
    size = config.micro_batch_size
    raw = engine._deepspeed

    def bare(batches: list[MicroBatch]) -> None:
        for batch in batches:
            loss = pretraining_loss(
                raw(batch), batch.mlm_labels_M, batch.nsp_labels_N, weights=config.loss, masked=batch.num_masked,
                pairs=size,
            ).loss  # fmt: skip
            raw.backward(loss)
            raw.step()

    def seconds(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    loop, ratios = loop_over(config, engine, data, process, rows, folder), []
    for turn in range(TURNS + 1):
        steps = range(turn * TURN_STEPS, (turn + 1) * TURN_STEPS)
        batches = [bounded(data.training_batch(config.seed, np.arange(i * size, (i + 1) * size))) for i in steps]
        works = {"bare": lambda batches=batches: bare(batches), "loop": loop}
        order = list(works)[:: 1 if turn % 2 else -1]
        taken = {name: seconds(works[name]) for name in order}
        ratios.append(taken["loop"] / taken["bare"])
    dist.finish()
    return statistics.median(ratios[1:]) - 1.0


def loop_over(
    config: TrainConfig, engine: Engine, data: TrainingCorpus, process: dist.Process, rows: int, folder: Path
) -> Callable[[], None]:
    """The next `TURN_STEPS` steps of the real loop with loader and telemetry; no evaluation, no checkpoint."""
    from pretrain.checkpoint import Writer, WriterOptions
    from pretrain.config import Identity
    from pretrain.data.loader import Layout, MicroBatches, training_steps
    from pretrain.evaluate.doctor import Doctor
    from pretrain.loop import rate_of, seed_dropout, timed
    from pretrain.metrics import MetricsAccumulator
    from pretrain.session import Session
    from pretrain.telemetry.sinks import open_telemetry
    from pretrain.telemetry.throughput import Throughput
    from pretrain.watchdog import StopRequest, Watchdog

    telemetry = open_telemetry(config, folder, resume_step=None, wandb_id=None, resolved={})
    size = config.micro_batch_size
    options = WriterOptions(rank=0, num_writers=1, keep_last=1, keep_every=0, patience_seconds=1)
    writer = Writer(folder, options, print)  # idle
    session = Session(
        config=config, path=folder, process=process, corpus=data, engine=engine, telemetry=telemetry,
        doctor=Doctor(None),
        throughput=Throughput(None), writer=writer, mirror=None, watchdog=Watchdog(0, folder, 0), stop=StopRequest(),
        progress=Progress(), vocab_rows=rows, identity=Identity.of(config, data.manifest, data.sha256), config_yaml="",
    )  # fmt: skip
    metrics = MetricsAccumulator(session)
    dataset = MicroBatches(data.directory, config.seed, Layout(0, 1, size, size))
    steps = (TURNS + 1) * TURN_STEPS
    ahead = timed(training_steps(dataset, steps=steps, workers=0, prefetch=1, pin_memory=False))

    def loop() -> None:
        for loaded, wait in islice(ahead, TURN_STEPS):
            micro_batches, _ = metrics.agree(loaded, wait)
            for number, batch in enumerate(micro_batches):
                seed_dropout(config.seed, session.progress.step, number, 0)
                metrics.stopwatch.mark()
                engine.backward(batch, metrics.loss_of)
            rate = rate_of(config, session.progress)
            metrics.count_step(rate, engine.step(rate))
            if session.progress.step % config.log.every == 0:
                metrics.log()

    return loop


def matmul_peak() -> float:
    """Best fp32 FLOP/s of a product of this CPU, one thread, by CPU time."""
    left, right = torch.randn(1536, 1536), torch.randn(1536, 1536)
    best = 0.0
    for _ in range(12):
        start = time.process_time()
        left @ right
        best = max(best, 2 * 1536**3 / (time.process_time() - start))
    return best


def work_of(corpus: Path, model: str) -> tuple[int, float]:
    """(real tokens, model FLOPs) of the steps after the warm-up."""
    data = TrainingCorpus(corpus)
    config = config_of(corpus, Path(), model)
    size = config.micro_batch_size
    batch = data.training_batch(config.seed, np.arange(WARMUP * size, (WARMUP + STEPS) * size))
    rows = -(-data.manifest.tokenizer.vocab_size // config.model.pad_vocab_to) * config.model.pad_vocab_to
    numbers = batch.num_tokens, batch.tokens_squared, batch.num_masked, STEPS * size
    return batch.num_tokens, training_flops(config.model, rows, *numbers)


def worker(task: str, corpus: Path, model: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks: dict[str, Callable[[], float]] = {
            "ours": lambda: ours(corpus, folder, model),
            "peer": lambda: peer(corpus, folder, model),
            "overhead": lambda: overhead(corpus, folder, model),
        }
        print(f"FOUND {tasks[task]()} {matmul_peak()}")


def measured(task: str, corpus: Path, model: str) -> tuple[float, float]:
    """(seconds, matmul peak) of a worker process."""
    command = [sys.executable, __file__, "--worker", task, "--corpus", str(corpus), "--model", model]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    _, seconds, peak = next(line for line in done.stdout.splitlines() if line.startswith("FOUND")).split()
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="JSON lines of text, plain or zstd")
    parser.add_argument("--work", type=Path, help="keep the prepared corpora here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.corpus, arguments.model)
        return
    if not arguments.source:
        parser.error("--source is needed")
    result: dict[str, object] = {"load_at_start": os.getloadavg()[0], "model": arguments.model, "threads": 1}
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        for max_len in BATCH:
            corpus = prepare(arguments.source.resolve(), work / str(max_len), max_len)
            tokens, flops = work_of(corpus, arguments.model)
            rounds = [
                [measured(task, corpus, arguments.model) for task in ("ours", "peer")] for _ in range(arguments.rounds)
            ]
            ratio = statistics.median(theirs / mine for (mine, _), (theirs, _) in rounds)
            rate = statistics.median(tokens / mine for (mine, _), _ in rounds)
            share = statistics.median(flops / mine / peak for (mine, peak), _ in rounds)
            added, _ = measured("overhead", corpus, arguments.model)
            result[f"{max_len}"] = {
                "tokens_per_cpu_second": rate, "times_trainer": ratio, "share_of_matmul_peak": share,
                "loop_overhead": added, "seconds": rounds,
            }  # fmt: skip
            print(
                f"{max_len:4} tokens  {rate:8,.0f} real tokens per CPU second  {ratio:.2f}x Trainer (bar {BAR})  "
                f"{share:.0%} of the matmul peak  loop adds {added:+.1%} (bar {OVERHEAD_BAR:.0%})",
                flush=True,
            )
    result["load_at_end"] = os.getloadavg()[0]
    out = Path(__file__).parent / "results" / "train_cpu.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
