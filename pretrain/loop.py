"""The training loop. It wires parts that know their business; all it owns is their order."""

import hashlib
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import ExitCode, TrainingError
from pretrain.checkpoint import TrainingState, Writer
from pretrain.config import TrainConfig
from pretrain.dist import Process
from pretrain.engine import Engine
from pretrain.evaluate import evaluate
from pretrain.loader import Corpus, MicroBatch
from pretrain.loss import means, pretraining_loss
from pretrain.schedule import learning_rate
from pretrain.telemetry import Telemetry, Throughput, training_flops
from pretrain.watchdog import StopRequest, Watchdog


@dataclass(kw_only=True)
class Progress:
    """Where the run stands, counted over all ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    config: TrainConfig
    process: Process
    corpus: Corpus
    engine: Engine
    telemetry: Telemetry
    throughput: Throughput
    writer: Writer
    watchdog: Watchdog
    stop: StopRequest
    progress: Progress
    vocab_rows: int
    config_yaml: str


def train(run: Run, steps: Iterable[Sequence[MicroBatch]]) -> ExitCode:
    """Train from `run.progress.step` to `steps`, `stop_at` or a requested stop; a checkpoint stands at the end."""
    config, progress = run.config, run.progress
    window = Window(run)
    saved = progress.step
    for micro_batches, wait_seconds in timed(steps):
        totals = window.count(micro_batches, wait_seconds)
        if totals.stop or (config.stop_at is not None and progress.step >= config.stop_at):
            break
        for number, batch in enumerate(micro_batches):
            seed_dropout(config.seed, progress.step, number, run.process.rank)
            run.engine.backward(batch.to(run.process.device), window.loss_of)
        rate = learning_rate(progress.step, config.steps, config.optim, config.schedule)
        result = run.engine.step(rate)
        window.stepped(result.applied)

        last = progress.step == config.steps
        if last or progress.step % config.log.every == 0:
            run.telemetry.log(progress.step, window.read(rate, result.grad_norm))
        if last or is_due(progress.step, config.eval.every):
            with run.throughput.pause():
                run.telemetry.log(progress.step, evaluate(run.engine, run.corpus, config, run.process))
        if last or is_due(progress.step, config.checkpoint.every):
            with run.throughput.pause():
                saved = save(run)
        run.watchdog.tick()
    if saved != progress.step:
        save(run)
    run.writer.close()
    return ExitCode.OK if progress.step == config.steps else ExitCode.STOPPED


class Totals:
    """What all ranks know of one step before its first backward pass."""

    __slots__ = ("masked", "pairs", "samples", "stop", "tokens", "tokens_squared")

    def __init__(self, masked: float, pairs: float, samples: float, tokens: float, squared: float, stop: float) -> None:
        self.masked, self.pairs, self.samples = int(masked), int(pairs), int(samples)
        self.tokens, self.tokens_squared, self.stop = int(tokens), int(squared), bool(stop)


class Window:
    """What happened since the last line of metrics. Sums stay on the device; `read` is where the host looks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._run.process.device)
        self._masked = self._pairs = self._skipped = 0

    def count(self, micro_batches: Sequence[MicroBatch], wait_seconds: float) -> Totals:
        """One small all-reduce of host integers: the counts that normalize the loss, and whether someone must stop."""
        run = self._run
        samples = sum(len(batch.nsp_labels_N) for batch in micro_batches)
        mine = (
            sum(len(batch.mlm_labels_M) for batch in micro_batches),
            samples if run.corpus.has_pairs else 0,
            samples,
            sum(len(batch.input_ids_T) for batch in micro_batches),
            sum(batch.tokens_squared for batch in micro_batches),
            run.stop.requested,
        )
        self._totals = totals = Totals(*run.process.add(mine))
        flops = training_flops(
            run.config.model, run.vocab_rows, totals.tokens, totals.tokens_squared, totals.masked, totals.pairs
        )
        run.throughput.add(tokens=totals.tokens, samples=totals.samples, flops=flops, wait_seconds=wait_seconds)
        return totals

    def loss_of(self, logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
        """This micro-batch's share of the global loss."""
        losses = pretraining_loss(
            logits,
            batch.mlm_labels_M,
            batch.nsp_labels_N,
            weights=self._run.config.loss,
            masked=self._totals.masked,
            pairs=self._totals.pairs,
        )
        self._sums += losses.sums
        return losses.loss

    def stepped(self, applied: bool) -> None:
        """Count the step; give up when updates are skipped again and again."""
        progress, totals = self._run.progress, self._totals
        progress.step += 1
        progress.samples += totals.samples
        progress.tokens += totals.tokens
        self._masked += totals.masked
        self._pairs += totals.pairs
        self._skipped += not applied
        progress.skipped_in_a_row = 0 if applied else progress.skipped_in_a_row + 1
        limit = self._run.config.optim.max_skipped_steps
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"step {progress.step}: gradients were not finite for {limit} steps in a row; the weights are those of "
                f"step {progress.step - limit}. Lower optim.lr, or use precision=fp32 to see where it comes from"
            )

    def read(self, rate: float, grad_norm: float) -> dict[str, float]:
        """The line of metrics over all steps since the last one. Collective."""
        run = self._run
        sums = run.process.add(self._sums.tolist())
        losses = means(sums, weights=run.config.loss, masked=self._masked, pairs=self._pairs)
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {"train/grad_norm": grad_norm, "train/lr": rate, "train/skipped_steps": self._skipped}
        if run.engine.loss_scale != 1.0:
            metrics["train/loss_scale"] = run.engine.loss_scale
        metrics |= run.throughput.read()
        self._clear()
        return {**metrics, "samples": run.progress.samples, "tokens": run.progress.tokens}


def save(run: Run) -> int:
    """Take a checkpoint of this step, which is written in the background; returns the step."""
    state = TrainingState(
        step=run.progress.step,
        samples=run.progress.samples,
        tokens=run.progress.tokens,
        optimizer_steps=run.engine.optimizer_steps,
        loss_scale=run.engine.loss_scale,
        manifest_sha256=run.corpus.sha256,
        tokenizer_fingerprint=run.corpus.manifest.tokenizer.fingerprint,
        seed=run.config.seed,
        global_batch_size=run.config.global_batch_size,
        wandb_id=run.telemetry.wandb_id,
    )
    run.writer.submit(state, run.engine.fragments(), run.engine.shapes, run.config_yaml)
    return run.progress.step


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Dropout follows from where we are: there is no random state to save."""
    digest = hashlib.blake2b(struct.pack("<QQQQ", seed, step, micro_batch, rank), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def timed(steps: Iterable[Sequence[MicroBatch]]) -> Iterator[tuple[Sequence[MicroBatch], float]]:
    """Each step's micro-batches with the seconds that we waited for them."""
    iterator = iter(steps)
    while True:
        start = time.perf_counter()
        try:
            micro_batches = next(iterator)
        except StopIteration:
            return
        yield micro_batches, time.perf_counter() - start


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
