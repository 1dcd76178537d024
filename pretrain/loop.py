"""The training loop. It wires parts that know their business; all it owns is their order."""

import hashlib
import json
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cloze.errors import DiskError, ExitCode, PeerFailed, TrainingError, UserError
from pretrain.checkpoint import TrainingState, Writer
from pretrain.config import Identity, Precision, TrainConfig
from pretrain.data.loader import Corpus, MicroBatch
from pretrain.dist import Process
from pretrain.engine.engine import Engine, StepResult
from pretrain.evaluate.held_out import evaluate
from pretrain.guessing import LossWatch
from pretrain.model.loss import means, pretraining_loss
from pretrain.optim.schedule import learning_rate, rate_between
from pretrain.telemetry.sinks import Telemetry
from pretrain.telemetry.throughput import RankWork, Stopwatch, Throughput, training_flops
from pretrain.watchdog import StopRequest, Watchdog

SKIPPED = "skipped.jsonl"
_SPIKE_WINDOWS = 5  # logged losses that make the running mean
_SETTLE_SECONDS = 0.5


@dataclass(kw_only=True)
class Progress:
    """Where the run stands, counted over all ranks and all starts."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    skipped_in_a_row: int = 0
    verdict: str | None = None  # what is wrong with the model at the end, as far as its losses tell


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run."""

    config: TrainConfig
    path: Path
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
    identity: Identity
    config_yaml: str


def train(run: Run, steps: Iterable[Sequence[MicroBatch]]) -> ExitCode:
    """Train to the end of `steps`, `stop_at`, the time budget or a requested stop; a checkpoint stands at the end."""
    config, progress, window = run.config, run.progress, Window(run)
    outcome, evaluated, saved = ExitCode.OK, -1, progress.step  # at step 0 there is nothing to save
    for loaded, wait_seconds in timed(steps):
        micro_batches, totals = window.agree(loaded, wait_seconds)
        if spent(config, progress) >= 1.0:
            break
        if totals.stop or (config.stop_at is not None and progress.step >= config.stop_at):
            outcome = ExitCode.STOPPED
            break
        for number, batch in enumerate(micro_batches):
            seed_dropout(config.seed, progress.step, number, run.process.rank)
            window.stopwatch.mark()
            last = number == len(micro_batches) - 1
            run.engine.backward(batch.to(run.process.device), window.loss_of, last=last)
        rate = rate_of(config, progress)
        window.stepped(rate, run.engine.step(rate))

        if is_due(progress.step, config.log.every):
            window.log()
        if is_due(progress.step, config.eval.every):
            evaluated = evaluate_now(run)
        if is_due(progress.step, config.checkpoint.every):
            saved = save(run)
        run.watchdog.tick()
    if not progress.step and spent(config, progress) >= 1.0:
        raise UserError(
            f"budget.hours={config.budget.hours:g}: was spent before the first step, so nothing is trained; raise it"
        )
    window.log()
    if outcome is ExitCode.OK and (verdict := window.watch.verdict()):
        progress.verdict = verdict
        run.telemetry.say(f"warning: step {progress.step}: {verdict}")
    if outcome is ExitCode.OK and evaluated != progress.step:
        evaluate_now(run)
    if saved != progress.step:
        save(run)
    settle(run)
    run.process.on_main(run.writer.close)
    return outcome


class LossSpike(Exception):
    """The loss jumped: the last checkpoint is better than what we have."""

    def __init__(self, step: int, loss: float, mean: float, sound_step: int) -> None:
        super().__init__(f"step {step}: loss {loss:.3f}, its running mean is {mean:.3f}")
        self.sound_step = sound_step  # the last one of which that was not so


class Totals:
    """What all ranks know of one step before its first backward pass."""

    def __init__(self, added: Sequence[float]) -> None:
        self.masked, self.pairs, self.samples, self.tokens = (int(value) for value in added[:4])
        self.tokens_squared, self.row_tokens = int(added[4]), int(added[5])
        self.stop, self.seconds, self.failed, self.disk_full = bool(added[6]), added[7], bool(added[8]), bool(added[9])


class Window:
    """What happened since the last line of metrics. Sums stay on the device; `read` is where the host looks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._clock = time.monotonic
        self._started = self._clock() - run.progress.seconds
        self._losses: deque[float] = deque(maxlen=_SPIKE_WINDOWS)
        self._sound_step = run.progress.step
        self.watch = LossWatch(run.config, run.corpus.manifest.tokenizer.vocab_size)
        self.stopwatch = Stopwatch(run.process.device)
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._run.process.device)
        self._masked = self._pairs = self._skipped = self._steps = 0

    def agree(
        self, loaded: Sequence[MicroBatch] | UserError, wait_seconds: float
    ) -> tuple[Sequence[MicroBatch], Totals]:
        """One small all-reduce of host numbers: the counts that normalize the loss, who must stop, rank 0's clock.

        Where a rank could not load its samples, or saves fail again and again, it raises its own error and the others
        `PeerFailed`.
        """
        run = self._run
        micro_batches = () if isinstance(loaded, UserError) else loaded
        fault = loaded if isinstance(loaded, UserError) else run.writer.trouble
        samples = sum(len(batch.nsp_labels_N) for batch in micro_batches)
        mine = (
            sum(batch.num_masked for batch in micro_batches),
            samples if run.corpus.has_pairs else 0,
            samples,
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.tokens_squared for batch in micro_batches),
            sum(len(batch.input_ids_T) for batch in micro_batches),
            run.stop.requested,
            self._clock() - self._started if run.process.is_main else 0.0,
            fault is not None,
            isinstance(fault, DiskError),
        )
        self._totals = totals = Totals(run.process.add(mine))
        if fault:
            raise fault
        if totals.failed:
            raise PeerFailed("another rank tells why", ExitCode.DISK if totals.disk_full else ExitCode.USAGE)
        run.progress.seconds = totals.seconds
        flops = training_flops(
            run.config.model, run.vocab_rows, totals.tokens, totals.tokens_squared, totals.masked, totals.pairs
        )
        run.throughput.add(tokens=totals.tokens, samples=totals.samples, row_tokens=totals.row_tokens, flops=flops)
        self.stopwatch.waited(wait_seconds)
        return micro_batches, totals

    def loss_of(self, logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
        """This micro-batch's share of the global loss. Called where the forward pass ends."""
        self.stopwatch.mark()
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

    def stepped(self, rate: float, result: StepResult) -> None:
        """Count the step; give up when updates are skipped again and again."""
        run, progress, totals = self._run, self._run.progress, self._totals
        if not result.applied and run.process.is_main:
            first = progress.samples
            note_skipped(run.path, progress.step, first, first + totals.samples)
        progress.step += 1
        progress.samples += totals.samples
        progress.tokens += totals.tokens
        self._steps += 1
        self._masked += totals.masked
        self._pairs += totals.pairs
        self._skipped += not result.applied
        self._rate, self._grad_norm = rate, result.grad_norm
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        limit = run.config.optim.max_skipped_steps
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"step {progress.step}: gradients were not finite for {limit} steps in a row; the weights are those of "
                f"step {progress.step - limit}, {run.path / SKIPPED} lists the samples. Lower optim.lr, or use "
                "precision=fp32 to see where it comes from"
            )

    def log(self) -> None:
        """Log what all ranks did since the last line, if anything. Collective."""
        run = self._run
        if not self._steps:
            return
        own_sums = self._sums.tolist()  # waits for the device, once per line of metrics
        rows = run.process.gather([*own_sums, *self.stopwatch.read()])
        sums, ranks = [sum(column) for column in zip(*rows, strict=True)][:4], [RankWork(*row[4:]) for row in rows]
        losses = means(sums, weights=run.config.loss, masked=self._masked, pairs=self._pairs)
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {
            "train/grad_norm": float(self._grad_norm),
            "train/lr": self._rate,
            "train/skipped_steps": self._skipped,
            "train/masked_tokens": self._masked,
            "train/pairs": self._pairs,
            **run.throughput.read(ranks),
            "samples": run.progress.samples,
            "tokens": run.progress.tokens,
        }
        if run.config.precision is Precision.fp16:
            metrics["train/loss_scale"] = run.engine.loss_scale.value
        self._clear()
        run.telemetry.log(run.progress.step, metrics)
        if line := self.watch.saw(run.progress.step, share_done(run.config, run.progress), losses):
            run.telemetry.say(line)
        self._guard(losses["loss"])

    def _guard(self, loss: float) -> None:
        """Raise `LossSpike` on every rank alike: all of them computed the same loss."""
        factor = self._run.config.guard.spike_factor
        mean = sum(self._losses) / max(1, len(self._losses))
        if factor is not None and len(self._losses) == self._losses.maxlen and not loss <= factor * mean:
            raise LossSpike(self._run.progress.step, loss, mean, self._sound_step)
        self._losses.append(loss)
        self._sound_step = self._run.progress.step


def spent(config: TrainConfig, progress: Progress) -> float:
    """Share of the time budget that is gone; 0 without one."""
    return progress.seconds / (config.budget.hours * 3600) if config.budget.hours else 0.0


def share_done(config: TrainConfig, progress: Progress) -> float:
    """Share of the run before the step to come: of its steps, or of the time budget where there is one."""
    return spent(config, progress) if config.budget.hours else progress.step / config.steps


def rate_of(config: TrainConfig, progress: Progress) -> float:
    """Learning rate of the step to come: by steps, or by the clock where there is a time budget."""
    if config.budget.hours:
        share = spent(config, progress)
        return rate_between(share, share, config.optim, config.schedule)
    return learning_rate(progress.step, config.steps, config.optim, config.schedule)


def evaluate_now(run: Run) -> int:
    """Evaluate, log, and return the step."""
    progress = run.progress
    with run.throughput.pause():
        found = evaluate(run.engine, run.corpus, run.config, run.process, run.watchdog.tick)
        run.telemetry.log(progress.step, {**found, "samples": progress.samples, "tokens": progress.tokens})
    return progress.step


def note_skipped(folder: Path, step: int, first: int, end: int) -> None:
    """Write down which run positions a skipped step held: `order.locate` gives the samples, for replay."""
    with (folder / SKIPPED).open("a") as file:
        file.write(json.dumps({"step": step, "first_position": first, "end_position": end}) + "\n")


def save(run: Run) -> int:
    """Take a checkpoint of this step, which is written in the background; returns the step."""
    state = TrainingState(
        step=run.progress.step,
        samples=run.progress.samples,
        tokens=run.progress.tokens,
        seconds=run.progress.seconds,
        optimizer_steps=run.engine.optimizer_steps,
        rollbacks=run.progress.rollbacks,
        loss_scale=run.engine.loss_scale,
        identity=run.identity,
        wandb_id=run.telemetry.wandb_id,
    )
    with run.throughput.pause():
        run.writer.submit(state, run.engine.fragments(), run.engine.shapes, run.config_yaml)
    return run.progress.step


def settle(run: Run) -> None:
    """Wait until every rank's checkpoint is written and uploaded. The watchdog looks whether that gets ahead."""
    progress = -1.0
    while (found := run.process.add([run.writer.busy(_SETTLE_SECONDS), run.writer.progress]))[0]:
        if found[1] != progress:
            progress = found[1]
            run.watchdog.tick()


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Dropout follows from where we are: there is no random state to save."""
    digest = hashlib.blake2b(struct.pack("<QQQQ", seed, step, micro_batch, rank), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def timed(steps: Iterable[Sequence[MicroBatch]]) -> Iterator[tuple[Sequence[MicroBatch] | UserError, float]]:
    """Each step's micro-batches, or why there are none, with the seconds that we waited for them."""
    iterator = iter(steps)
    while True:
        start = time.perf_counter()
        try:
            loaded: Sequence[MicroBatch] | UserError = next(iterator)
        except StopIteration:
            return
        except UserError as error:  # the other ranks wait for us in a collective: they must hear of it
            loaded = error
        yield loaded, time.perf_counter() - start


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
