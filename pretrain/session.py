"""What a run is made of: a `Job` is one process of it before there is a model, a `Session` what the loop works with.

Both are opened in `with`, and say at their end how it came: the run's status, the trackers, the watchdog.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import yaml

from cloze.corpus import diagnosis
from cloze.corpus.shards import CorruptShard
from cloze.errors import ORDERLY_ENDS, ExitCode, UserError
from cloze.redact import redact
from pretrain import checkpoint, dist
from pretrain.agreement import agree, agree_on_corpus
from pretrain.changes import changed, describe_changes, learning_rate_jump, note
from pretrain.checkpoint import Snapshot
from pretrain.checkpoint.mirror import Mirror, retention_of
from pretrain.comparison import Comparison
from pretrain.config import (
    Access,
    Identity,
    Precision,
    TrainConfig,
    accumulation_steps,
    as_data,
    batch_size,
    check_ranks,
)
from pretrain.curriculum import Curriculum
from pretrain.data.cache import local_corpus, mark_suspect
from pretrain.data.live_masks import check_masking
from pretrain.data.loader import TrainingCorpus
from pretrain.data.mixture import MixedCorpus, require_alike
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.evaluate.baseline import Baseline, mean_baseline
from pretrain.evaluate.doctor import Doctor
from pretrain.evaluate.gaps import RunGaps, open_gaps
from pretrain.evaluate.run_grammar import RunGrammar, open_grammar
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert
from pretrain.model.compiler import require_compiler
from pretrain.model.initialize import initialize
from pretrain.peers import Peers, this_process
from pretrain.phases import (
    Phase,
    config_of_engine,
    identity_of,
    model_to_build,
    phase_at,
    phase_before,
    phases_of,
)
from pretrain.plan import DEFAULTS, GIB, check_memory, corpus_options
from pretrain.precision import with_precision
from pretrain.resume import restore
from pretrain.run_directory import RunDirectory
from pretrain.telemetry.metrics_file import METRICS_NAME
from pretrain.telemetry.report import read_metrics
from pretrain.telemetry.sinks import Telemetry, open_telemetry
from pretrain.telemetry.throughput import Throughput, peak_flops
from pretrain.watchdog import StopRequest, Watchdog

_BASELINE_SAMPLES = 10_000  # the entropy of few words is too low: by 0.4 nats in 384 samples with 8,192 words


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
    peers: Peers
    phases: tuple[Phase, ...]
    corpora: tuple[TrainingCorpus, ...] = ()  # of each phase
    directory: RunDirectory | None = None
    code: int = ExitCode.FAILED  # how it ends, unless something better is known
    _on_guard: ClassVar[list[Watchdog]] = []  # of a job that failed: until the process ends, or the next job begins

    def __init__(self, config: TrainConfig) -> None:
        self.path = Path(config.runs_root) / config.run
        self.set_config(config)
        self.precision_is_open = config.precision is Precision.auto
        self.stop, self.progress = StopRequest(), Progress()  # before the process group
        while self._on_guard:
            self._on_guard.pop().close()
        limits = config.watchdog
        self.watchdog = Watchdog(limits.seconds, self.path, dist.environment_rank(), limits.start_seconds)

    def set_config(self, config: TrainConfig) -> None:
        """Raises `UserError` where its phases are not what they must be."""
        self.config, self.phases = config, phases_of(config)

    @property
    def phase(self) -> Phase:
        """Of the step to come."""
        return phase_at(self.phases, self.progress.step)

    @property
    def corpus(self) -> TrainingCorpus | None:
        """Of the step to come; None before it is open."""
        return self.corpora[self.phase.number - 1] if self.corpora else None

    @property
    def identity(self) -> Identity:
        """Of the whole run."""
        every = zip(self.phases, self.corpora, strict=True)
        return identity_of(self.phases, [Identity.of(phase.config, one.manifest, one.sha256) for phase, one in every])

    @dist.translate_peer_loss()
    def join(self) -> None:
        """Meet the other ranks, agree with them on what is to be trained, and open the corpora. Collective."""
        self.process = process = dist.start(lambda: self.stop.requested)
        process.together(lambda: self.set_config(with_precision(self.config, process.device)))
        config = self.config
        self.peers = Peers(process.gather_objects(this_process()))
        process.on_main(dist.check_hostfile)
        agree(process, config)
        if config.compile:  # before a corpus is copied, which may take hours
            process.together(lambda: require_compiler(process.device, process.log.info))
        process.together(self._check_ranks)
        self.corpora = process.together(self._open_corpora)
        self.directory = process.here_on_main(lambda: RunDirectory(self.path))
        digests = list(dict.fromkeys(corpus.sha256 for corpus in self.corpora))
        agree_on_corpus(process, ", ".join(digest[:12] for digest in digests), self.path)

    def _check_ranks(self) -> None:
        for phase in self.phases:
            check_ranks(phase.config, self.process.world_size)

    def _open_corpora(self) -> tuple[TrainingCorpus, ...]:
        corpora = open_corpora(self.phases, lambda: self.stop.requested)
        tokenizer = corpora[0].directory / "tokenizer"
        if not tokenizer.is_dir():
            raise UserError(f"{tokenizer}: not there; copy or prepare the corpus again")
        return corpora

    def copy_of(self, error: UserError) -> Path | None:
        """Our own copy of a corpus that the damaged shard is of which an error tells, if it is."""
        if not isinstance(error, CorruptShard) or not self.config.data.cache_dir:
            return None
        own = (one.directory for corpus in self.corpora for one in corpus.corpora)
        return next((directory for directory in own if str(directory) in str(error)), None)

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
        if copy := job.copy_of(error):
            mark_suspect(copy)
            raise CorruptShard(f"{error}: this is a copy, and the same command mends it") from error
        raise
    except BaseException:
        job.code = ExitCode.FAILED
        raise
    finally:
        job.leave()


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run that trains, in one of its phases."""

    config: TrainConfig  # of the phase
    phase: Phase
    path: Path
    process: Process
    corpus: TrainingCorpus
    engine: Engine
    comparison: Comparison
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
    except Exception as error:  # a collective fails when another rank is gone
        if dist.is_peer_loss(error):
            job.code = ExitCode.STUCK  # as it will be told: the trackers are told it first
        session.writer.shorten_patience()
        raise
    finally:
        job.watchdog.tick(slow=job.code in ORDERLY_ENDS)
        session.telemetry.close(int(job.code))


def _build(job: Job, snapshot: Snapshot | None, mirror: Mirror | None) -> Session:
    phase, path, process, corpus, progress = job.phase, job.path, job.process, job.corpus, job.progress
    config = phase.config
    assert corpus
    # Of the first corpus, in whichever phase the run resumes; a mistake in its files is told before any is written.
    grammar = open_grammar(config, job.corpora[0], process)
    resolved = as_data(asdict(config))
    before = _yaml_of(phase_before(job.phases, progress.step).config)
    changes = changed(snapshot.config_yaml, before) if snapshot else {}
    _describe_run(job, _yaml_of(job.config), changes)
    engine, vocab_rows = build_engine(job.phases, job.corpora, process, snapshot, progress.step)
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
    baseline = process.here_on_main(lambda: baseline_of(corpus, config))
    process.log.info(describe(job, engine))
    if changes:
        process.log.info(describe_changes(changes, progress.step))
    alone = len(job.phases) == 1
    if snapshot and alone and (jump := learning_rate_jump(snapshot.config_yaml, config, progress.step)):
        process.log.warning(jump)
    _warn_of_corpus(config, corpus, process)
    _apply(engine, phase, progress.samples)
    peak = peak_flops(torch.cuda.get_device_name()) if process.device.type == "cuda" else None
    return Session(
        config=config,
        phase=phase,
        path=path,
        process=process,
        corpus=corpus,
        engine=engine,
        comparison=Comparison(engine, corpus, config, process, progress.step),
        telemetry=telemetry,
        doctor=Doctor(baseline, earlier),
        grammar=grammar,
        gaps=open_gaps(config, job.corpora[0], path),
        throughput=Throughput(peak * process.world_size if peak else None),
        writer=_open_writer(job, snapshot, mirror),
        mirror=mirror,
        watchdog=job.watchdog,
        stop=job.stop,
        progress=progress,
        curriculum=Curriculum(phase),
        vocab_rows=vocab_rows,
        identity=job.identity,
        config_yaml=_yaml_of(config),
    )


def enter_phase(session: Session, job: Job) -> Session:
    """The next phase's session: the same model, optimizer and trackers, with the phase's own data. Collective."""
    phase, corpus, process = job.phase, job.corpus, session.process
    assert corpus
    process.log.info(
        f"phase {phase.number} of {len(job.phases)}, from step {phase.span.first_step}\n"
        + "\n".join(describe_data(phase, corpus))
    )
    if corpus is not session.corpus:
        _warn_of_corpus(phase.config, corpus, process)
        session.doctor.change_corpus(process.here_on_main(lambda: baseline_of(corpus, phase.config)))
    _apply(session.engine, phase, job.progress.samples)
    return replace(
        session,
        config=phase.config,
        phase=phase,
        corpus=corpus,
        curriculum=Curriculum(phase),
        config_yaml=_yaml_of(phase.config),
    )


def _apply(engine: Engine, phase: Phase, samples: int) -> None:
    """What the engine has otherwise in this phase, whichever it was made in."""
    if phase.config.phases is not None:
        engine.set_rotary(phase.config.model)
        values = Curriculum(phase).at(samples)
        engine.set_dropout(values["model.dropout"], values["model.attention_dropout"])
        engine.set_weight_decay(phase.config.optim.weight_decay)


def _yaml_of(config: TrainConfig) -> str:
    text: str = yaml.safe_dump(redact(as_data(asdict(config))), sort_keys=False, allow_unicode=True)
    return text


def baseline_of(corpus: TrainingCorpus, config: TrainConfig) -> Baseline | None:
    """What guessing reaches on its held-out samples, on more of them than are evaluated where those are few."""
    samples = config.eval.max_samples
    return mean_baseline([one.directory for one in corpus.corpora], max(samples, _BASELINE_SAMPLES) if samples else 0)


def open_corpora(phases: Sequence[Phase], stop: Callable[[], bool]) -> tuple[TrainingCorpus, ...]:
    """The corpus of each phase; one that several read is opened once.

    Raises `UserError` where one does not fit the others, the model or its masks.
    """
    found: list[TrainingCorpus] = []
    for phase in phases:
        config, data = phase.config, phase.config.data
        before = next((i for i in range(len(found)) if phases[i].reads_as(phase)), None)
        corpus = found[before] if before is not None else open_corpus(phase, stop)
        first, where = found[0] if found else corpus, f"phases: phase {phase.number}: " if len(phases) > 1 else ""
        require_alike(corpus, first, where)
        if len(phases) > 1 and corpus.manifest.max_len > config.model.max_positions:
            raise UserError(
                f"{where}{corpus.directory} has samples of {corpus.manifest.max_len} tokens, more than "
                f"model.max_positions={config.model.max_positions}; set that to the longest of the run"
            )
        for one in corpus.corpora:
            check_masking(data, one.manifest)
        found.append(corpus)
    return tuple(found)


def open_corpus(phase: Phase, stop: Callable[[], bool]) -> TrainingCorpus:
    """The corpus of a phase, or its mixture."""
    data = phase.config.data
    streamed = data.access is Access.stream  # then no more than held-out splits are copied
    folders = [local_corpus(part.path, data.cache_dir, data.cache_gib, streamed, stop) for part in data.parts]
    if data.mixture is None:
        return TrainingCorpus(folders[0])
    lanes = data.lanes if streamed else 1
    return MixedCorpus(data.parts, folders, data.temperature_curve, phase.config.seed, phase.data_samples, lanes)


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
    for one in corpus.corpora:
        findings = diagnosis.warnings(diagnosis.stored(one.manifest), ignore=("held_out",))  # told above, if missed
        for finding in findings:
            process.log.warning(f"{one.directory}: {finding.line}")
        for mismatch in config.expect.unmet(one.manifest):
            process.log.warning(f"{one.directory} was prepared with {mismatch} as the recipe expects")


def _open_writer(job: Job, snapshot: Snapshot | None, mirror: Mirror | None) -> checkpoint.Writer:
    """It sends first what an earlier start could not, or had no time for. Collective."""
    config, process = job.config, job.process
    options = checkpoint.WriterOptions(
        rank=process.rank,
        num_writers=process.world_size if config.zero.stage else 1,
        patience_seconds=config.checkpoint.patience_seconds,
        retention=retention_of(config),
        token=process.on_main(lambda: secrets.token_hex(4)),
    )
    writer = checkpoint.Writer(
        job.path / "checkpoints",
        options,
        process.log.warning,
        upload=mirror.push if mirror else None,
        on_saved=job.directory.note_saved if job.directory else lambda step: None,
    )
    if snapshot and process.is_main and (found := checkpoint.path_of(writer.folder, snapshot.state.step)).exists():
        writer.upload(found)
    return writer


def build_engine(
    phases: Sequence[Phase],
    corpora: Sequence[TrainingCorpus],
    process: Process,
    snapshot: Snapshot | None,
    step: int = 0,
) -> tuple[Engine, int]:
    """The sharded model with the checkpoint's state in it, and the rows of its embedding matrix.

    Set up alike in whichever phase the run resumes, at `step`, but for how positions turn.
    """
    config, corpus = phases[0].config, corpora[0]
    torch.manual_seed(config.seed)
    facts, objective = corpus.manifest.tokenizer, corpus.manifest.objective
    capability = torch.cuda.get_device_capability(process.device) if process.device.type == "cuda" else None
    model = model_to_build(phases, phase_at(phases, step))
    kernel = choose_kernel(model, config.precision, capability)
    module = PackedBert(model, facts, max_len=max(one.manifest.max_len for one in corpora), kernel=kernel)
    if corpus.has_pairs and not module.has_pairs:
        raise UserError(
            f"model={model.name}: {model.architecture.value} has no next-sentence head, and "
            f"{corpus.directory} was prepared with objective={objective}; prepare with objective=none, or use a BERT"
        )
    if process.device.type == "cuda":
        count = sum(parameter.numel() for parameter in module.parameters())
        available_gib = torch.cuda.get_device_properties(process.device).total_memory / GIB
        for phase, one in zip(phases, corpora, strict=True):
            known = replace(phase.config, model=replace(phase.config.model, attention=kernel))
            options = corpus_options(DEFAULTS, one.manifest, phase.config.data)
            check_memory(known, options, count, process.world_size, available_gib)
    if config.compile:
        module.compile_layers()
    if snapshot:
        module.load_weights(snapshot.weights)
    elif config.init_from:
        own = corpus.directory / "tokenizer"
        notes = initialize(module, config.init_from, facts, own, config.init_allow, config.init_positions)
        process.log.info(notes)
    engine = Engine(module, config_of_engine(phases), process)
    if snapshot:
        restore(engine, snapshot, corpus, process)
    return engine, module.vocab_rows


def describe(job: Job, engine: Engine) -> str:
    """What is about to happen, in a few lines."""
    phase, process, corpus = job.phase, job.process, job.corpus
    assert corpus
    config = phase.config
    accumulation = accumulation_steps(config.peak_batch_size, config.micro_batch_size, process.world_size)
    start = f"resuming at step {job.progress.step}" if job.progress.step else "starting"
    end = str(config.steps)
    if len(job.phases) > 1:
        end += f" in phase {phase.number} of {len(job.phases)}"
    if config.budget.hours is not None:
        end += f" at most, in {config.budget.hours:g} hours"
    ramp = config.batch_ramp
    ramped = f" (from {ramp.start} at first, in {ramp.fraction:.0%} of the run)" if ramp.start else ""
    if not config.batch_sizes.is_constant:
        ramped = f" at most (from {batch_size(0.0, config)} at first)"
    rate = f"{config.optim.kind} at {config.optim.peak_lr:g}"
    if config.optim.rates:
        rate += " at most: optim.lr is a curve, in place of the schedule"
    threads = torch.get_num_threads()
    each = f" ({threads} thread{'s' * (threads > 1)} each)" if process.device.type == "cpu" else ""
    lines = [
        f"run {job.path}: {start} of {end}, "
        f"model {config.model.name} ({engine.num_parameters / 1e6:.1f}M parameters), {rate}",
        *describe_data(phase, corpus),
        f"{process.world_size} x {process.device.type}{each}, ZeRO {config.zero.value}, {config.precision.value}: "
        f"global batch {config.peak_batch_size} = {process.world_size} ranks x {accumulation} accumulation steps "
        f"x micro-batch {config.micro_batch_size}{ramped}",
    ]
    return "\n".join(lines)


def describe_data(phase: Phase, corpus: TrainingCorpus) -> list[str]:
    """What is read, how large it is, and how often it will be read: a line, and of a mixture one for each corpus."""
    if len(corpus.corpora) == 1:
        samples, longest = sum(corpus.pass_sizes), corpus.manifest.max_len
        epochs = phase.span.samples / max(1, corpus.epoch_samples)
        return [f"data {corpus.directory}: {samples:,} samples of up to {longest} tokens, {epochs:.2f} epochs"]
    return [f"data a mixture of {len(corpus.corpora)} corpora", *(f"  {line}" for line in corpus.told())]
