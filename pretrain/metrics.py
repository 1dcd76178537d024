"""What happened since the last line of metrics: what all ranks know of a step, its losses, spikes of the loss."""

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cloze.errors import DiskError, ExitCode, PeerFailed, TrainingError, UserError
from pretrain.config import LossConfig, Precision
from pretrain.data.loader import MicroBatch
from pretrain.engine.engine import StepResult
from pretrain.guessing import LossWatch
from pretrain.model.loss import means, pretraining_loss
from pretrain.session import Session
from pretrain.telemetry.throughput import RankWork, Stopwatch, training_flops

SKIPPED = "skipped.jsonl"
_SPIKE_LINES = 5  # logged losses that make the running mean


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


class MetricsAccumulator:
    """What happened since the last line of metrics. Sums stay on the device; `read` is where the host looks."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._clock = time.monotonic
        self._started = self._clock() - session.progress.seconds
        self._losses: deque[float] = deque(maxlen=_SPIKE_LINES)
        self._sound_step = session.progress.step
        self.watch = LossWatch(session.config, session.corpus.manifest.tokenizer.vocab_size)
        self.stopwatch = Stopwatch(session.process.device)
        self._weights: LossConfig = session.config.loss
        self._curves: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._session.process.device)
        self._masked = self._pairs = self._skipped = self._steps = 0

    def agree(
        self, loaded: Sequence[MicroBatch] | UserError, wait_seconds: float
    ) -> tuple[Sequence[MicroBatch], Totals]:
        """One small all-reduce of host numbers: the counts that normalize the loss, who must stop, rank 0's clock.

        Where a rank could not load its samples, or saves fail again and again, it raises its own error and the others
        `PeerFailed`.
        """
        session = self._session
        micro_batches = () if isinstance(loaded, UserError) else loaded
        fault = loaded if isinstance(loaded, UserError) else session.writer.failure
        samples = sum(len(batch.nsp_labels_N) for batch in micro_batches)
        mine = (
            sum(batch.num_masked for batch in micro_batches),
            samples if session.corpus.has_pairs else 0,
            samples,
            sum(batch.num_tokens for batch in micro_batches),
            sum(batch.tokens_squared for batch in micro_batches),
            sum(len(batch.input_ids_T) for batch in micro_batches),
            session.stop.requested,
            self._clock() - self._started if session.process.is_main else 0.0,
            fault is not None,
            isinstance(fault, DiskError),
        )
        self._totals = totals = Totals(session.process.add(mine))
        if fault:
            raise fault
        if totals.failed:
            raise PeerFailed("another rank tells why", ExitCode.DISK if totals.disk_full else ExitCode.USAGE)
        session.progress.seconds = totals.seconds
        flops = training_flops(
            session.config.model, session.vocab_rows, totals.tokens, totals.tokens_squared, totals.masked, totals.pairs
        )
        session.throughput.add(tokens=totals.tokens, samples=totals.samples, row_tokens=totals.row_tokens, flops=flops)
        self.stopwatch.waited(wait_seconds)
        return micro_batches, totals

    def begin_step(self, weights: LossConfig, curves: Mapping[str, float]) -> None:
        """The numbers of the step to come: loss weights, and what changes over the run, by the name of its metric."""
        self._weights, self._curves = weights, dict(curves)

    def loss_of(self, logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
        """This micro-batch's share of the global loss. Called where the forward pass ends."""
        self.stopwatch.mark()
        losses = pretraining_loss(
            logits,
            batch.mlm_labels_M,
            batch.nsp_labels_N,
            weights=self._weights,
            masked=self._totals.masked,
            pairs=self._totals.pairs,
        )
        self._sums += losses.sums
        return losses.loss

    def count_step(self, rate: float, result: StepResult) -> None:
        """Count the step; give up when updates are skipped again and again."""
        session, progress, totals = self._session, self._session.progress, self._totals
        if not result.applied and session.process.is_main:
            first = progress.samples
            record_skipped_step(session.path, progress.step, first, first + totals.samples)
        progress.step += 1
        progress.samples += totals.samples
        progress.tokens += totals.tokens
        self._steps += 1
        self._masked += totals.masked
        self._pairs += totals.pairs
        self._skipped += not result.applied
        self._rate, self._grad_norm = rate, result.grad_norm
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        limit = session.config.optim.max_skipped_steps
        if progress.skipped_in_a_row >= limit:
            raise TrainingError(
                f"step {progress.step}: gradients were not finite for {limit} steps in a row; the weights are those of "
                f"step {progress.step - limit}, {session.path / SKIPPED} lists the samples. Lower optim.lr, or use "
                "precision=fp32 to see where it comes from"
            )

    def log(self) -> None:
        """Log what all ranks did since the last line, if anything. Collective."""
        session = self._session
        if not self._steps:
            return
        own_sums = self._sums.tolist()  # waits for the device, once per line of metrics
        rows = session.process.gather([*own_sums, *self.stopwatch.read()])
        sums, ranks = [sum(column) for column in zip(*rows, strict=True)][:4], [RankWork(*row[4:]) for row in rows]
        losses = means(sums, weights=self._weights, masked=self._masked, pairs=self._pairs)
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {
            "train/grad_norm": float(self._grad_norm),
            "train/lr": self._rate,
            "train/skipped_steps": self._skipped,
            "train/masked_tokens": self._masked,
            "train/pairs": self._pairs,
            **self._curves,
            **session.corpus.progress(session.progress.samples - session.phase.data_start),
            **session.throughput.read(ranks),
            "samples": session.progress.samples,
            "tokens": session.progress.tokens,
        }
        if session.config.precision is Precision.fp16:
            metrics["train/loss_scale"] = session.engine.loss_scale.value
        self._clear()
        session.telemetry.log(session.progress.step, metrics)
        if line := self.watch.saw(session.progress.step, session.progress.share_done(session.config), losses):
            session.process.log.warning(line)
        self._guard(losses["loss"])

    def _guard(self, loss: float) -> None:
        """Raise `LossSpike` on every rank alike: all of them computed the same loss."""
        factor = self._session.config.guard.spike_factor
        mean = sum(self._losses) / max(1, len(self._losses))
        if factor is not None and len(self._losses) == self._losses.maxlen and not loss <= factor * mean:
            raise LossSpike(self._session.progress.step, loss, mean, self._sound_step)
        self._losses.append(loss)
        self._sound_step = self._session.progress.step


def record_skipped_step(folder: Path, step: int, first: int, end: int) -> None:
    """Write down which run positions a skipped step held: `order.locate` gives the samples, for replay."""
    with (folder / SKIPPED).open("a") as file:
        file.write(json.dumps({"step": step, "first_position": first, "end_position": end}) + "\n")
