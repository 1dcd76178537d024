"""What a run is made of: a `Job` is one process of it before there is a model, a `Session` what the loop works with.

Both are opened in `with`, and say at their end how it came: the run's status, the trackers, the watchdog.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from cloze.corpus import diagnosis
from cloze.corpus.shards import CorruptShard
from cloze.errors import ORDERLY_ENDS, ExitCode, UserError
from pretrain import checkpoint, dist
from pretrain.changes import changed, describe_changes, learning_rate_jump, note
from pretrain.checkpoint import Snapshot
from pretrain.checkpoint.mirror import Mirror, retention_of
from pretrain.config import (
    Access,
    Identity,
    Precision,
    TrainConfig,
    accumulation_steps,
    as_data,
    batch_size,
    check_ranks,
    total_samples,
)
from pretrain.curriculum import Curriculum
from pretrain.data.cache import local_corpus, mark_suspect
from pretrain.data.live_masks import check_masking
from pretrain.data.loader import TrainingCorpus
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.evaluate.baseline import held_out_baseline
from pretrain.evaluate.doctor import Doctor
from pretrain.evaluate.gaps import RunGaps, open_gaps
from pretrain.evaluate.run_grammar import RunGrammar, open_grammar
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert
from pretrain.model.compiler import require_compiler
from pretrain.model.initialize import initialize
from pretrain.plan import DEFAULTS, GIB, check_memory, corpus_options
from pretrain.precision import with_precision
from pretrain.resume import restore
from pretrain.run_directory import RunDirectory
from pretrain.telemetry.metrics_file import METRICS_NAME
from pretrain.telemetry.redact import redact
from pretrain.telemetry.report import read_metrics
from pretrain.telemetry.sinks import Telemetry, open_telemetry
from pretrain.telemetry.throughput import Throughput, peak_flops
from pretrain.watchdog import StopRequest, Watchdog


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

    def resume(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        state = snapshot.state
        self.step, self.samples, self.tokens = state.step, state.samples, state.tokens
        self.seconds, self.rollbacks = state.seconds, state.rollbacks

    def budget_spent(self, config: TrainConfig) -> float:
        """Share of the time budget that is gone; 0 without one."""
        return self.seconds / (config.budget.hours * 3600) if config.budget.hours else 0.0

    def share_done(self, config: TrainConfig) -> float:
        """Share of the run before the step to come: of its steps, or of the time budget where there is one."""
        return self.budget_spent(config) if config.budget.hours else self.step / config.steps


class Job:
    """This process, from the signals that it heeds to its corpus; on rank 0 also the run's directory and its lock."""

    process: Process
    corpus: TrainingCorpus | None = None
    directory: RunDirectory | None = None
    code: int = ExitCode.FAILED  # how it ends, unless something better is known
    _on_guard: ClassVar[list[Watchdog]] = []  # of a job that failed: until the process ends, or the next job begins

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.path = config, Path(config.runs_root) / config.run
        self.precision_is_open = config.precision is Precision.auto
        self.stop, self.progress = StopRequest(), Progress()  # before the process group
        while self._on_guard:
            self._on_guard.pop().close()
        limits = config.watchdog
        self.watchdog = Watchdog(limits.seconds, self.path, dist.environment_rank(), limits.start_seconds)

    def join(self) -> None:
        """Meet the other ranks, and open the corpus. Collective."""
        config, data = self.config, self.config.data
        self.process = dist.start()
        self.config = config = with_precision(config, self.process.device)
        self.process.on_main(dist.check_hostfile)
        if config.compile:  # before a corpus is copied, which may take hours
            require_compiler(self.process.device, self.process.log.info)
        check_ranks(config, self.process.world_size)
        held_out_only = data.access is Access.stream  # the rest is streamed
        self.corpus = TrainingCorpus(
            local_corpus(data.path, data.cache_dir, data.cache_gib, held_out_only, lambda: self.stop.requested)
        )
        check_masking(data, self.corpus.manifest)
        self.directory = self.process.here_on_main(lambda: RunDirectory(self.path))
        if not (self.corpus.directory / "tokenizer").is_dir():
            raise UserError(f"{self.corpus.directory / 'tokenizer'}: not there; copy or prepare the corpus again")

    def has_copied(self, error: UserError) -> bool:
        """Whether the damaged shard that an error tells of is of our own copy of the corpus."""
        mine = self.corpus and self.config.data.cache_dir and str(self.corpus.directory) in str(error)
        return isinstance(error, CorruptShard) and bool(mine)

    def leave(self) -> None:
        if self.directory:
            self.directory.write_status(int(self.code), self.progress.step, self.progress.verdict)
            self.directory.close()
        if self.code in ORDERLY_ENDS:
            self.watchdog.close()
        else:
            self.watchdog.tick()  # still on guard: a thread that hangs, as in an upload, would hold up the end
            self._on_guard.append(self.watchdog)


@contextmanager
def open_job(config: TrainConfig) -> Iterator[Job]:
    """A job that has joined the others. How it ended is written down: `code`, or what a `UserError` says."""
    job = Job(config)
    try:
        job.join()
        yield job
    except UserError as error:
        job.code = error.exit_code
        if job.corpus and job.has_copied(error):
            mark_suspect(job.corpus.directory)
            raise CorruptShard(f"{error}: this is a copy, and the same command mends it") from error
        raise
    except BaseException:
        job.code = ExitCode.FAILED
        raise
    finally:
        job.leave()


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run that trains."""

    config: TrainConfig
    path: Path
    process: Process
    corpus: TrainingCorpus
    engine: Engine
    telemetry: Telemetry
    doctor: Doctor  # rank 0's alone knows the baseline
    grammar: RunGrammar | None
    gaps: RunGaps | None
    throughput: Throughput
    writer: checkpoint.Writer
    mirror: Mirror | None
    watchdog: Watchdog
    stop: StopRequest
    progress: Progress
    curriculum: Curriculum
    vocab_rows: int  # of the embedding matrix
    identity: Identity
    config_yaml: str


@contextmanager
def open_session(job: Job, snapshot: Snapshot | None, mirror: Mirror | None) -> Iterator[Session]:
    """The parts of a run that goes on from `snapshot`, or from the start; its trackers are told the job's code."""
    session = _build(job, snapshot, mirror)
    try:
        yield session
    except UserError as error:
        job.code = error.exit_code
        raise
    except Exception:  # a collective fails when another rank is gone
        session.writer.shorten_patience()
        raise
    finally:
        job.watchdog.tick(slow=job.code in ORDERLY_ENDS)
        session.telemetry.close(int(job.code))


def _build(job: Job, snapshot: Snapshot | None, mirror: Mirror | None) -> Session:
    config, path, process, corpus, progress = job.config, job.path, job.process, job.corpus, job.progress
    assert corpus
    grammar = open_grammar(config, corpus, process)  # a mistake in its files is told before anything is written
    resolved = as_data(asdict(config))
    config_yaml = yaml.safe_dump(redact(resolved), sort_keys=False, allow_unicode=True)
    changes = changed(snapshot.config_yaml, config_yaml) if snapshot else {}
    _describe_run(job, config_yaml, changes)
    engine, vocab_rows = build_engine(config, corpus, process, snapshot)
    wandb_id = snapshot.state.wandb_id if snapshot else None
    if process.is_main:
        telemetry = open_telemetry(
            config,
            path,
            resume_step=progress.step if snapshot else None,
            wandb_id=wandb_id,
            resolved=resolved,
            seconds=progress.seconds,
        )
    else:
        telemetry = Telemetry([], None, wandb_id)
    earlier = read_metrics(path / METRICS_NAME) if process.is_main and snapshot else ()
    baseline = process.here_on_main(lambda: held_out_baseline(corpus.directory, config.eval.max_samples))
    process.log.info(describe(job, engine))
    if changes:
        process.log.info(describe_changes(changes, progress.step))
    if snapshot and (jump := learning_rate_jump(snapshot.config_yaml, config, progress.step)):
        process.log.warning(jump)
    _warn_of_corpus(config, corpus, process)
    peak = peak_flops(torch.cuda.get_device_name()) if process.device.type == "cuda" else None
    return Session(
        config=config,
        path=path,
        process=process,
        corpus=corpus,
        engine=engine,
        telemetry=telemetry,
        doctor=Doctor(baseline, earlier),
        grammar=grammar,
        gaps=open_gaps(config, corpus, path),
        throughput=Throughput(peak * process.world_size if peak else None),
        writer=_open_writer(job, mirror),
        mirror=mirror,
        watchdog=job.watchdog,
        stop=job.stop,
        progress=progress,
        curriculum=Curriculum(config),
        vocab_rows=vocab_rows,
        identity=Identity.of(config, corpus.manifest, corpus.sha256),
        config_yaml=config_yaml,
    )


def _describe_run(job: Job, config_yaml: str, changes: Mapping[str, tuple[str, str]]) -> None:
    """Write down in the run's directory what it is, and what is not as it was before."""
    directory, process = job.directory, job.process
    if not directory:
        return
    assert job.corpus
    before = directory.ranks_before()
    if before not in (None, process.world_size):
        process.log.info(
            f"{job.path}: {before} ranks before, {process.world_size} now; the global batches stay the same"
        )
    directory.describe(config_yaml, job.corpus.directory / "tokenizer", process.world_size)
    note(job.path, changes, job.progress.step)


def _warn_of_corpus(config: TrainConfig, corpus: TrainingCorpus, process: Process) -> None:
    if config.eval.every and not any(corpus.held_out.values()):
        process.log.warning(
            f"eval.every={config.eval.every}: {corpus.directory} has no held-out split, so nothing is evaluated; "
            "prepare it with val_fraction=0.01"
        )
    for finding in diagnosis.warnings(diagnosis.stored(corpus.manifest), ignore=("held_out",)):  # told above, if missed
        process.log.warning(f"{corpus.directory}: {finding.line}")
    for mismatch in config.expect.unmet(corpus.manifest):
        process.log.warning(f"{corpus.directory} was prepared with {mismatch} as the recipe expects")


def _open_writer(job: Job, mirror: Mirror | None) -> checkpoint.Writer:
    """Collective."""
    config, process = job.config, job.process
    options = checkpoint.WriterOptions(
        rank=process.rank,
        num_writers=process.world_size if config.zero.stage else 1,
        patience_seconds=config.checkpoint.patience_seconds,
        retention=retention_of(config),
        token=process.on_main(lambda: secrets.token_hex(4)),
    )
    return checkpoint.Writer(
        job.path / "checkpoints",
        options,
        process.log.warning,
        upload=mirror.push if mirror else None,
        on_saved=job.directory.note_saved if job.directory else lambda step: None,
    )


def build_engine(
    config: TrainConfig, corpus: TrainingCorpus, process: Process, snapshot: Snapshot | None
) -> tuple[Engine, int]:
    """The sharded model with the checkpoint's state in it, and the rows of its embedding matrix."""
    torch.manual_seed(config.seed)
    facts, objective = corpus.manifest.tokenizer, corpus.manifest.objective
    capability = torch.cuda.get_device_capability(process.device) if process.device.type == "cuda" else None
    kernel = choose_kernel(config.model, config.precision, capability)
    module = PackedBert(config.model, facts, max_len=corpus.manifest.max_len, kernel=kernel)
    if corpus.has_pairs and not module.has_pairs:
        raise UserError(
            f"model={config.model.name}: {config.model.architecture.value} has no next-sentence head, and "
            f"{corpus.directory} was prepared with objective={objective}; prepare with objective=none, or use a BERT"
        )
    if process.device.type == "cuda":
        count = sum(parameter.numel() for parameter in module.parameters())
        known = replace(config, model=replace(config.model, attention=kernel))
        available_gib = torch.cuda.get_device_properties(process.device).total_memory / GIB
        check_memory(
            known, corpus_options(DEFAULTS, corpus.manifest, config.data), count, process.world_size, available_gib
        )
    if config.compile:
        module.compile_layers()
    if snapshot:
        module.load_weights(snapshot.weights)
    elif config.init_from:
        own = corpus.directory / "tokenizer"
        notes = initialize(module, config.init_from, facts, own, config.init_allow, config.init_positions)
        process.log.info(notes)
    engine = Engine(module, config, process)
    if snapshot:
        restore(engine, snapshot, corpus, process)
    return engine, module.vocab_rows


def describe(job: Job, engine: Engine) -> str:
    """What is about to happen, in three lines."""
    config, process, corpus = job.config, job.process, job.corpus
    assert corpus
    accumulation = accumulation_steps(config.peak_batch_size, config.micro_batch_size, process.world_size)
    samples = sum(corpus.pass_sizes)
    epochs = total_samples(config) / max(1, samples / corpus.manifest.passes)
    start = f"resuming at step {job.progress.step}" if job.progress.step else "starting"
    end = str(config.steps)
    if config.budget.hours is not None:
        end += f" at most, in {config.budget.hours:g} hours"
    ramp = config.batch_ramp
    ramped = f" (from {ramp.start} at first, in {ramp.fraction:.0%} of the run)" if ramp.start else ""
    if not config.batch_sizes.is_constant:
        ramped = f" at most (from {batch_size(0.0, config)} at first)"
    rate = f"{config.optim.kind} at {config.optim.peak_lr:g}"
    if config.optim.rates:
        rate += " at most: optim.lr is a curve, in place of the schedule"
    return (
        f"run {job.path}: {start} of {end}, "
        f"model {config.model.name} ({engine.num_parameters / 1e6:.1f}M parameters), "
        f"{rate}\n"
        f"data {corpus.directory}: {samples:,} samples of up to {corpus.manifest.max_len} tokens, {epochs:.2f} epochs\n"
        f"{process.world_size} x {process.device.type}, ZeRO {config.zero.value}, {config.precision.value}: "
        f"global batch {config.peak_batch_size} = {process.world_size} ranks x {accumulation} accumulation steps "
        f"x micro-batch {config.micro_batch_size}{ramped}"
    )
