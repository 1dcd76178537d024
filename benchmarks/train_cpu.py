"""Training on a CPU beside Hugging Face's Trainer: `python benchmarks/train_cpu.py --source books-small.jsonl.zst`.

The same samples of real text, the same model (BERT-mini, vocabulary 30,522, dropout 0.1), one thread, the precision
that `precision=auto` takes here; both sides eager and compiled (where there is a C++ compiler), each at its best:

- ours: the training command (zero=0: as unsharded as the peer), packed rows, MLM head on masked positions;
- peer: `Trainer` over `BertForPreTraining` with SDPA, under bf16 autocast where that is the precision, rows padded to
  the batch's longest (compiled: to the greatest length, so that shapes stay), head on every position;
- bare: DeepSpeed's engine on the same micro-batches, ready-made, for what our loop (loading included) adds: 32 steps of
  each in one process, in turns of four.

Besides samples of 128 and 512 tokens, about 4,000 tokens a step, 8 samples of 32 tokens a step: what a step costs
besides its arithmetic. And two cores against one, as two ranks of one thread and as one rank of two threads, mini and
tiny, by the clock: `--sharing` measures this row alone, on a machine where both cores are idle, and keeps the others.

Every round runs all sides in processes of their own, in turns; figures are CPU seconds of the process (others use the
machine too) after warm-up steps; medians of the ratios. Also the share of the CPU's matmul peak.
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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cloze import cli
from pretrain import dist
from pretrain.config import Precision, TrainConfig
from pretrain.data.loader import IGNORED, MicroBatch, TrainingCorpus, bounded
from pretrain.engine.engine import Engine, StepResult
from pretrain.model.loss import pretraining_loss
from pretrain.phases import phases_of
from pretrain.precision import cpu_flags, cpu_name, fastest_precision
from pretrain.process import train
from pretrain.session import Progress, build_engine
from pretrain.telemetry.throughput import training_flops

WARMUP, STEPS = 4, 6
TURNS, TURN_STEPS = 8, 4  # of the loop and of the bare engine, after one turn of each to warm up
BATCH = {128: 32, 512: 8, 32: 8}  # samples of so many tokens
BAR, AMX_BAR, SMALL_BAR, OVERHEAD_BAR, RANKS_BAR = 3.0, 5.0, 3.0, 0.03, 1.8
PRECISION = fastest_precision(torch.device("cpu"))


def prepare(source: Path, out: Path, max_len: int) -> Path:
    if not (out / "manifest.json").exists():
        command = [
            sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{source}]", f"out={out}",
            f"max_len={max_len}", "tokenizer.vocab_size=30522", "executor.workers=1",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return out


def config_of(corpus: Path, folder: Path, model: str, *more: str) -> TrainConfig:
    size = BATCH[TrainingCorpus(corpus).manifest.max_len]
    overrides = [
        f"model={model}", f"data.path={corpus}", f"runs_root={folder}", "run=bench", "zero=0",
        f"precision={PRECISION.value}", f"global_batch_size={size}", f"micro_batch_size={size}",
        f"steps={WARMUP + STEPS}", "data.workers=0",
        "eval.every=0", "checkpoint.every=0", "log.every=1", "wandb.mode=disabled", "optim.clip=1", *more,
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


def ours(corpus: Path, folder: Path, model: str, *more: str) -> float:
    """Seconds of the training command itself."""
    clock, update = Clock(), Engine.step

    def step(self: Engine, lr: float) -> StepResult:
        result = update(self, lr)
        clock.mark()
        return result

    Engine.step = step
    assert train(config_of(corpus, folder, model, *more)) == 0
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


def padded(rows: list[dict[str, Tensor]], to: int = 0) -> dict[str, Tensor]:
    """Rows as one batch, padded to `to` tokens, or to the longest."""
    fillers = {"input_ids": 0, "token_type_ids": 0, "labels": IGNORED}

    def pad(parts: list[Tensor], _batch_first: bool, filler: int) -> Tensor:
        length = to or max(map(len, parts))
        return torch.stack([torch.nn.functional.pad(part, (0, length - len(part)), value=filler) for part in parts])

    batch = {key: pad([row[key] for row in rows], True, filler) for key, filler in fillers.items()}
    ones = [torch.ones_like(row["input_ids"]) for row in rows]
    labels = torch.stack([row["next_sentence_label"] for row in rows])
    return batch | {"attention_mask": pad(ones, True, 0), "next_sentence_label": labels}


def peer(corpus: Path, folder: Path, model: str, *, compiled: bool = False) -> float:
    """Seconds of Hugging Face's Trainer."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pretrain.model.architectures import blueprint_of

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
        logging_steps=1, remove_unused_columns=False, dataloader_pin_memory=False, torch_compile=compiled,
        bf16=PRECISION is Precision.bf16,
    )  # fmt: skip
    InOrder(
        model=blueprint_of(config.model.architecture).build(config.model, facts, facts.vocab_size),
        args=arguments,
        train_dataset=Rows(data, config.seed, size * (WARMUP + STEPS)),
        data_collator=partial(padded, to=data.manifest.max_len if compiled else 0),
        callbacks=[Marks()],
    ).train()
    return clock.seconds()


def overhead(corpus: Path, folder: Path, model: str) -> float:
    """Share of time that our loop adds to DeepSpeed's engine on the same micro-batches: the median of turns."""
    config = config_of(corpus, folder, model)
    process = dist.start()
    data = TrainingCorpus(corpus)
    engine, rows = build_engine(phases_of(config), [data], process, None)
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
    from pretrain.checkpoint import Retention, Writer, WriterOptions
    from pretrain.comparison import Comparison
    from pretrain.config import Identity
    from pretrain.curriculum import Curriculum
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
    options = WriterOptions(rank=0, num_writers=1, retention=Retention(keep_last=1), patience_seconds=1)
    writer = Writer(folder, options, print)  # idle
    (phase,) = phases_of(config)
    session = Session(
        config=config, phase=phase, path=folder, process=process, corpus=data, engine=engine, telemetry=telemetry,
        grammar=None, gaps=None, doctor=Doctor(None), comparison=Comparison(engine, data, config, process, 0),
        throughput=Throughput(None), writer=writer, mirror=None, watchdog=Watchdog(0, folder, 0), stop=StopRequest(),
        progress=Progress(), curriculum=Curriculum(phase), vocab_rows=rows,
        identity=Identity.of(config, data.manifest, data.sha256), config_yaml="",
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
            rate = rate_of(phase, session.progress, {})
            metrics.count_step(rate, engine.step(rate))
            if session.progress.step % config.log.every == 0:
                metrics.log()

    return loop


def matmul_peak() -> float:
    """Best FLOP/s of a product of this CPU in this precision, one thread, by CPU time."""
    dtype = torch.bfloat16 if PRECISION is Precision.bf16 else torch.float32
    left, right = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(12):
        start = time.process_time()
        left @ right
        best = max(best, 2 * 1536**3 / (time.process_time() - start))
    return best


def shared_speedups(corpus: Path, model: str) -> dict[str, float]:
    """How many times the tokens a second two cores train as two ranks and as two threads, of one core's; by the clock.

    Each on the same global batch, one micro-batch for each core, at the default ZeRO stage.
    """
    rates = {}
    for ranks, threads in ((1, 1), (2, 1), (1, 2)):
        with tempfile.TemporaryDirectory() as name:
            size = BATCH[TrainingCorpus(corpus).manifest.max_len]
            command = [
                sys.executable, "-m", "launch", f"procs={ranks}", f"model={model}", f"data.path={corpus}", "run=bench",
                f"runs_root={name}", f"precision={PRECISION.value}", f"global_batch_size={2 * size}", "zero=1",
                f"micro_batch_size={size}", "steps=16", "data.workers=0", "eval.every=0", "eval.max_samples=32",
                "checkpoint.every=0", "log.every=4", "wandb.mode=disabled",
            ]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[1])}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            lines = [json.loads(line) for line in (Path(name) / "bench" / "metrics.jsonl").read_text().splitlines()]
            found = [line["throughput/tokens_per_second"] for line in lines if "throughput/tokens_per_second" in line]
            rates[ranks, threads] = statistics.median(found[1:])
    return {"two_ranks": rates[2, 1] / rates[1, 1], "two_threads": rates[1, 2] / rates[1, 1]}


def measure_sharing(corpus: Path, models: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """`shared_speedups` of each round, by model; tells the medians."""
    result: dict[str, dict[str, list[float]]] = {}
    for model in models:
        found = [shared_speedups(corpus, model) for _ in range(rounds)]
        result[model] = {way: [one[way] for one in found] for way in ("two_ranks", "two_threads")}
        ranks, threads = (statistics.median(values) for values in result[model].values())
        print(
            f"{model} on two cores, times one: {ranks:.2f} as two ranks (bar {RANKS_BAR:g}), "
            f"{threads:.2f} as two threads",
            flush=True,
        )
    return result


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
            "ours_compiled": lambda: ours(corpus, folder, model, "compile=true"),
            "peer": lambda: peer(corpus, folder, model),
            "peer_compiled": lambda: peer(corpus, folder, model, compiled=True),
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


def measure(corpus: Path, model: str, rounds: int, sides: list[str]) -> dict[str, object]:
    """One case: each side's median seconds, the ratio of the best, and what the loop adds."""
    tokens, flops = work_of(corpus, model)
    found = [{side: measured(side, corpus, model) for side in sides} for _ in range(rounds)]
    seconds = {side: statistics.median(one[side][0] for one in found) for side in sides}
    best = {
        kind: min((side for side in sides if side.startswith(kind)), key=seconds.__getitem__)
        for kind in ("ours", "peer")
    }
    ratios = [one[best["peer"]][0] / one[best["ours"]][0] for one in found]
    share = statistics.median(flops / mine / peak for mine, peak in (one[best["ours"]] for one in found))
    return {
        "seconds": seconds, "best": best, "times_trainer": statistics.median(ratios), "ratios": ratios,
        "tokens_per_cpu_second": tokens / seconds[best["ours"]], "share_of_matmul_peak": share,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="JSON lines of text, plain or zstd")
    parser.add_argument("--work", type=Path, help="keep the prepared corpora here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--eager", action="store_true", help="nobody compiles")
    parser.add_argument("--sharing", action="store_true", help="two cores against one, and nothing else")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.corpus, arguments.model)
        return
    if not arguments.source:
        parser.error("--source is needed")
    out = Path(__file__).parent / "results" / "train_cpu.json"
    out.parent.mkdir(exist_ok=True)
    models = sorted({arguments.model, "tiny"})
    if arguments.sharing:
        with tempfile.TemporaryDirectory() as name:
            corpus = prepare(arguments.source.resolve(), (arguments.work or Path(name)) / "128", 128)
            kept = json.loads(out.read_text()) if out.exists() else {}
            kept["sharing"] = {"cpu": cpu_name(), **measure_sharing(corpus, models, arguments.rounds)}
        out.write_text(json.dumps(kept, indent=1) + "\n")
        return
    amx = "amx_bf16" in cpu_flags()
    result: dict[str, object] = {
        "cpu": cpu_name(), "amx": amx, "precision": PRECISION.value, "load_at_start": os.getloadavg()[0],
        "model": arguments.model, "threads": 1,
    }  # fmt: skip
    compiles = not arguments.eager and any(map(shutil.which, ("g++", "clang++")))
    sides = ["ours", "peer", *(["ours_compiled", "peer_compiled"] if compiles else [])]
    print(f"{result['cpu']}, AMX: {amx}, {PRECISION.value}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        for max_len, size in BATCH.items():
            corpus = prepare(arguments.source.resolve(), work / str(max_len), max_len)
            found = measure(corpus, arguments.model, arguments.rounds, sides)
            bar = SMALL_BAR if max_len == 32 else AMX_BAR if amx else BAR
            found["loop_overhead"], _ = measured("overhead", corpus, arguments.model)
            result[f"{max_len}"] = found
            print(
                f"{size} x {max_len:3} tokens  {found['tokens_per_cpu_second']:8,.0f} real tokens per CPU second  "
                f"{found['times_trainer']:.2f}x Trainer (bar {bar:g})  {found['share_of_matmul_peak']:.0%} of the "
                f"matmul peak  loop adds {found['loop_overhead']:+.1%} (bar {OVERHEAD_BAR:.0%})  best: {found['best']}",
                flush=True,
            )
            out.write_text(json.dumps(result, indent=1) + "\n")
        result["sharing"] = {"cpu": cpu_name(), **measure_sharing(work / "128", models, arguments.rounds)}
    result["load_at_end"] = os.getloadavg()[0]
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
