"""The training loop. It wires parts that know their business; all it owns is their order."""

import hashlib
import struct
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from cloze.errors import ExitCode, UserError
from pretrain.checkpoint import TrainingState
from pretrain.config import Access, batch_size
from pretrain.data.live_masks import live_masks
from pretrain.data.loader import Layout, MicroBatch, MicroBatches, Streaming, bounded, training_steps
from pretrain.evaluate.attention_entropy import attention_entropy
from pretrain.evaluate.held_out import evaluate
from pretrain.metrics import MetricsAccumulator
from pretrain.optim.schedule import learning_rate, rate_between
from pretrain.phases import Phase
from pretrain.session import Progress, Session

_POLL_SECONDS = 0.5


def train(session: Session, steps: Iterable[Sequence[MicroBatch]]) -> ExitCode:
    """Train to the end of a phase's `steps`, `stop_at`, the time budget or a requested stop, and save there."""
    config, progress, metrics = session.config, session.progress, MetricsAccumulator(session)
    outcome, saved = ExitCode.OK, progress.step  # at step 0 there is nothing to save
    held_out = grammar = False  # whether the step at hand is evaluated
    for loaded, wait_seconds in timed(steps):
        micro_batches, totals = metrics.agree(loaded, wait_seconds)
        if progress.budget_spent(config) >= 1.0:
            break
        if totals.stop or (config.stop_at is not None and progress.step >= config.stop_at):
            outcome = ExitCode.STOPPED
            break
        values = follow(session, metrics)
        for number, batch in enumerate(micro_batches):
            seed_dropout(config.seed, progress.step, number, session.process.rank)
            metrics.stopwatch.mark()
            last = number == len(micro_batches) - 1
            session.engine.backward(batch.to(session.process.device), metrics.loss_of, last=last)
        if is_due(progress.step + 1, config.checks.weights_every):  # before the step, which sends most of them anew
            session.comparison.weights(progress.step)
        rate, look = rate_of(session.phase, progress, values), is_due(progress.step + 1, config.log.layers_every)
        if look and session.engine.layers:
            session.engine.layers.watch(session.engine.loss_scale.value)
        metrics.count_step(rate, session.engine.step(rate))
        if look and session.engine.layers:
            session.telemetry.log(progress.step, session.engine.layers.read() | axes_of(progress))

        if is_due(progress.step, config.checks.arithmetic_every):
            with session.throughput.pause():
                session.comparison.arithmetic(progress.step)
        if is_due(progress.step, config.log.every):
            metrics.log()
        held_out, grammar = (is_due(progress.step, n) for n in (config.eval.every, config.eval.grammar_every))
        evaluate_now(session, metrics.watch.mlm_loss, held_out=held_out, grammar=grammar)
        if is_due(progress.step, config.checkpoint.every) or progress.step in config.kept_steps:
            saved = save(session)
        session.watchdog.tick()
    if not progress.step and progress.budget_spent(config) >= 1.0:
        raise UserError(
            f"budget.hours={config.budget.hours:g}: was spent before the first step, so nothing is trained; raise it"
        )
    metrics.log()
    if outcome is ExitCode.OK and (verdict := metrics.watch.verdict()):
        progress.verdict = verdict
        session.process.log.warning(f"step {progress.step}: {verdict}")
    if outcome is ExitCode.OK:
        evaluate_now(session, metrics.watch.mlm_loss, held_out=not held_out, grammar=not grammar)
    if saved != progress.step:
        save(session)
    wait_for_writer(session)
    return outcome


def follow(session: Session, metrics: MetricsAccumulator) -> Mapping[str, float]:
    """Set what the curves say of the step to come, and return it by key."""
    curriculum, samples = session.curriculum, session.progress.samples
    values = curriculum.at(samples)
    session.engine.set_distance_bias(values["model.distance_bias"])
    if not {"model.dropout", "model.attention_dropout"}.isdisjoint(curriculum.changing):
        session.engine.set_dropout(values["model.dropout"], values["model.attention_dropout"])
    metrics.begin_step(
        curriculum.loss(samples),
        {f"curves/{key}": values[key] for key in curriculum.changing},
    )
    return values


def rate_of(phase: Phase, progress: Progress, values: Mapping[str, float]) -> float:
    """Learning rate of the step to come: as its curve says, by steps, or by the clock where there is a time budget."""
    config, span = phase.config, phase.span_of("schedule")
    if "optim.lr" in values:
        return values["optim.lr"]
    if config.budget.hours:
        share = progress.budget_spent(config)
        return rate_between(share, share, config.optim, config.schedule)
    return learning_rate(progress.step - span.first_step, span.steps, config.optim, config.schedule)


def steps_ahead(session: Session) -> Generator[list[MicroBatch], None, None]:
    """This rank's micro-batches from where the run stands to the last step of its phase."""
    config, process, data, phase = session.config, session.process, session.config.data, session.phase
    masks = phase.span_of("data.masking_probability")
    streamed = data.access is Access.stream
    dataset = MicroBatches(
        session.corpus.opener,
        config.seed,
        Layout(process.rank, process.world_size, config.micro_batch_size, config.peak_batch_size),
        session.progress.samples - phase.data_start,
        Streaming(tuple(part.path for part in data.parts), data.lanes, data.window) if streamed else None,
        live_masks(data, masks.samples, masks.first_sample - phase.data_start),
    )
    stretch, ahead = process.world_size * config.micro_batch_size, range(session.progress.step, phase.span.end_step)
    return training_steps(
        dataset,
        steps=(next_batch_size(session) // stretch for _ in ahead),
        workers=min(data.workers, 1) if streamed else data.workers,  # a stream fetches by threads
        prefetch=data.prefetch,
        pin_memory=process.device.type == "cuda",
    )


def next_batch_size(session: Session) -> int:
    """Samples of the step to come: by samples of a curve, by steps or the clock of batch_ramp."""
    config, progress = session.config, session.progress
    if config.batch_sizes.is_constant:
        return batch_size(progress.share_done(config), config)
    return session.curriculum.batch_size(progress.samples)


def evaluate_now(session: Session, train_loss: float | None, *, held_out: bool, grammar: bool) -> None:
    """Evaluate what is asked for, and log it as one; `train_loss` is the masked-LM loss in training, as logged last."""
    progress, tick, turn = session.progress, session.watchdog.tick, None
    if not held_out and not (grammar and session.grammar):
        return
    with session.throughput.pause():
        found: dict[str, float] = {}
        if held_out:
            now = replace(session.config, loss=session.curriculum.loss(progress.samples))
            found = evaluate(session.engine, session.corpus, now, session.process, tick)
            if found and session.config.log.layers_every and session.process.is_main:
                found |= attention_of(session)
            beside, turn = session.doctor.examine(found, progress.tokens, train_loss)
            found |= beside
        if grammar and session.grammar:
            found |= session.grammar.evaluate(session.engine, session.process, tick)
        if held_out and session.gaps:
            session.gaps.evaluate(session.engine, session.process, progress.step)
            tick()
        session.telemetry.log(progress.step, {**found, **axes_of(progress)})
        if turn:
            session.process.log.info(turn)


def attention_of(session: Session) -> dict[str, float]:
    """The entropy of each layer's attention on a micro-batch of held-out samples. Of this rank alone."""
    split, samples = next((split, count) for split, count in session.corpus.held_out.items() if count)
    indices = np.arange(min(samples, session.config.micro_batch_size), dtype=np.int64)
    batch = bounded(session.corpus.val_batch(indices, split)).to(session.process.device)
    return attention_entropy(batch, session.engine.evaluate)


def axes_of(progress: Progress) -> dict[str, float]:
    """What every row of metrics has beside its step."""
    return {"samples": progress.samples, "tokens": progress.tokens}


def save(session: Session) -> int:
    """Take a checkpoint of this step, which is written in the background; returns the step."""
    if session.config.checks.weights_every:
        session.comparison.weights(session.progress.step)
    state = TrainingState(
        step=session.progress.step,
        samples=session.progress.samples,
        tokens=session.progress.tokens,
        seconds=session.progress.seconds,
        optimizer_steps=session.engine.optimizer_steps,
        rollbacks=session.progress.rollbacks,
        loss_scale=session.engine.loss_scale,
        identity=session.identity,
        wandb_id=session.telemetry.wandb_id,
    )
    with session.throughput.pause():
        session.writer.submit(state, session.engine.fragments(), session.engine.shapes, session.config_yaml)
    return session.progress.step


def wait_for_writer(session: Session) -> None:
    """Wait until every rank's checkpoint is written and uploaded. The watchdog looks whether that gets ahead."""
    progress = -1.0
    while (found := session.process.add([session.writer.busy(_POLL_SECONDS), session.writer.progress]))[0]:
        if found[1] != progress:
            progress = found[1]
            session.watchdog.tick()


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
