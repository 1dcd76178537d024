"""Entry: `deepspeed pretrain/train.py …`, `deepspeed --module pretrain.train …` or `python -m pretrain.train …`.

Hydra gives a typed configuration, this module wires the parts, loop.py runs them.
"""

import functools
import importlib
import os
import secrets
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: its own folder is on sys.path where the repository should be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import torch
import yaml

from cloze import cli
from cloze.corpus.manifest import VAL
from cloze.corpus.shards import CorruptShard
from cloze.errors import ExitCode, TrainingError, UserError
from pretrain import checkpoint, dist
from pretrain.changes import changed, note, refuse_other_architecture, told
from pretrain.checkpoint import Snapshot
from pretrain.checkpoint.mirror import Mirror
from pretrain.config import (
    RESUME_CHECKS,
    Access,
    Identity,
    TrainConfig,
    accumulation_steps,
    batch_size,
    check_ranks,
    total_samples,
)
from pretrain.data.cache import doubt, local_corpus
from pretrain.data.loader import Corpus, Layout, MicroBatch, MicroBatches, Streaming, training_steps
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.loop import LossSpike, Progress, Run, settle, share_done, spent, train
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert
from pretrain.model.initialize import initialize
from pretrain.plan import DEFAULTS, GIB, check_memory, corpus_options
from pretrain.run_directory import RunDirectory, refuse_lost
from pretrain.telemetry.redact import redact
from pretrain.telemetry.sinks import open_telemetry
from pretrain.telemetry.throughput import Throughput, peak_flops
from pretrain.watchdog import StopRequest, Watchdog


def main(config: TrainConfig) -> int:
    """One process of a run, from joining the group to leaving it. Returns the exit code."""
    if module := os.environ.get("CLOZE_FAULTS"):  # of tests: it lets things go wrong
        importlib.import_module(module)
    stop = StopRequest()
    path = Path(config.runs_root) / config.run
    watchdog = Watchdog(config.watchdog.seconds, path, dist.environment_rank(), config.watchdog.start_seconds)
    progress = Progress()
    directory: RunDirectory | None = None
    corpus: Corpus | None = None
    code: int = ExitCode.FAILED
    try:
        process = dist.start()
        process.on_main(dist.check_hostfile)
        check_ranks(config, process.world_size)
        data = config.data
        only = [VAL] if data.access is Access.stream else None  # the rest is streamed
        corpus = Corpus(local_corpus(data.path, data.cache_dir, data.cache_gib, only, lambda: stop.requested))
        directory = process.here_on_main(lambda: RunDirectory(path))
        code = run(config, path, directory, corpus, process, stop, watchdog, progress)
    except UserError as error:
        code = error.exit_code
        if isinstance(error, CorruptShard) and corpus and data.cache_dir and str(corpus.directory) in str(error):
            doubt(corpus.directory)
            raise CorruptShard(f"{error}: this is a copy, and the same command mends it") from error
        raise
    finally:
        if directory:
            directory.write_status(int(code), progress.step, progress.verdict)
            directory.close()
        watchdog.close()
    dist.finish()
    return code


@dist.lost_peers_told()
def run(
    config: TrainConfig,
    path: Path,
    directory: RunDirectory | None,
    corpus: Corpus,
    process: Process,
    stop: StopRequest,
    watchdog: Watchdog,
    progress: Progress,
) -> ExitCode:
    """Resume if there is something to resume, build the parts, train. `directory` is rank 0's."""
    if not (corpus.directory / "tokenizer").is_dir():
        raise UserError(f"{corpus.directory / 'tokenizer'}: not there; copy or prepare the corpus again")
    mirror = open_mirror(config)
    snapshot = resume(config, path / "checkpoints", corpus, process, mirror)
    if snapshot:
        progress.step, progress.samples = snapshot.state.step, snapshot.state.samples
        progress.tokens, progress.seconds = snapshot.state.tokens, snapshot.state.seconds
        progress.rollbacks = snapshot.state.rollbacks
    if progress.step >= config.steps:
        say(process, f"{path}: already at step {progress.step} of {config.steps}; raise `steps` or name another run")
        return ExitCode.OK
    if snapshot and spent(config, progress) >= 1.0:
        say(process, f"{path}: budget.hours={config.budget.hours} is spent, at step {progress.step}; raise it")
        return ExitCode.OK
    parts = build(config, path, directory, corpus, process, stop, watchdog, progress, snapshot, mirror)
    code = ExitCode.FAILED
    try:
        code = train_guarded(parts)
    except UserError as error:
        code = error.exit_code
        raise
    except Exception:  # a collective fails when another rank is gone
        parts.writer.hurry()
        raise
    finally:
        watchdog.tick(slow=True)
        parts.telemetry.close(int(code))
    process.barrier()  # launchers kill the others soon after the first rank that leaves, and rank 0 may need minutes
    return code


def build(
    config: TrainConfig,
    path: Path,
    directory: RunDirectory | None,
    corpus: Corpus,
    process: Process,
    stop: StopRequest,
    watchdog: Watchdog,
    progress: Progress,
    snapshot: Snapshot | None,
    mirror: Mirror | None,
) -> Run:
    """The parts of a run that goes on from `snapshot`, or from the start. Collective."""
    resolved = plain(asdict(config))
    config_yaml = yaml.safe_dump(redact(resolved), sort_keys=False, allow_unicode=True)
    if directory:
        before = directory.ranks_before()
        if before not in (None, process.world_size):
            say(process, f"{path}: {before} ranks before, {process.world_size} now; the global batches stay the same")
        directory.describe(config_yaml, corpus.directory / "tokenizer", process.world_size)
        if snapshot:
            note(path, changed(snapshot.config_yaml, config_yaml), progress.step)
    engine, vocab_rows = build_engine(config, corpus, process, snapshot)
    telemetry = open_telemetry(
        config,
        path,
        is_main=process.is_main,
        resume_step=progress.step if snapshot else None,
        wandb_id=snapshot.state.wandb_id if snapshot else None,
        resolved=resolved,
        seconds=progress.seconds,
    )
    say(process, describe(config, path, corpus, process, engine, progress))
    for line in told(snapshot.config_yaml, config_yaml, config, progress.step) if snapshot else ():
        say(process, line)
    if config.eval.every and not corpus.num_val:
        say(
            process,
            f"warning: eval.every={config.eval.every}: {corpus.directory} has no held-out split, so nothing is "
            "evaluated; prepare it with val_fraction=0.01",
        )
    for mismatch in config.expect.unmet(corpus.manifest):
        say(process, f"warning: {corpus.directory} was prepared with {mismatch} as the recipe expects")
    peak = peak_flops(torch.cuda.get_device_name()) if process.device.type == "cuda" else None
    return Run(
        config=config,
        path=path,
        process=process,
        corpus=corpus,
        engine=engine,
        telemetry=telemetry,
        throughput=Throughput(peak * process.world_size if peak else None),
        writer=checkpoint.Writer(
            path / "checkpoints",
            rank=process.rank,
            num_writers=process.world_size if config.stage else 1,
            patience_seconds=config.checkpoint.patience_seconds,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            say=telemetry.say,
            on_saved=directory.note_saved if directory else lambda step: None,
            upload=mirror.push if mirror else None,
            token=process.on_main(lambda: secrets.token_hex(4)),
        ),
        watchdog=watchdog,
        stop=stop,
        progress=progress,
        vocab_rows=vocab_rows,
        identity=Identity.of(config, corpus.manifest, corpus.sha256),
        config_yaml=config_yaml,
    )


def open_mirror(config: TrainConfig) -> Mirror | None:
    """Where checkpoints are uploaded to, if anywhere."""
    url, rules = config.checkpoint.upload, config.checkpoint
    if url is None:
        return None
    return Mirror(f"{url.rstrip('/')}/{config.run}", keep_last=rules.keep_last, keep_every=rules.keep_every)


def train_guarded(parts: Run) -> ExitCode:
    """Train; after a loss spike go back to the last checkpoint and on with the samples after the spike."""
    progress, most, folder = parts.progress, parts.config.guard.max_rollbacks, parts.path / "checkpoints"
    while True:
        try:
            with closing(steps_ahead(parts)) as steps:  # ends the loader's processes, whatever happens
                return train(parts, steps)
        except LossSpike as spike:
            if progress.rollbacks >= most:
                raise TrainingError(f"{spike}; {most} rollbacks did not help: lower optim.lr") from spike
            settle(parts)
            sound_step, skip_to, reason = spike.sound_step, progress.samples, str(spike)
        parts.process.on_main(functools.partial(give_up_after, parts, sound_step))
        found = newest(folder, parts.process)
        if found is None:
            raise TrainingError(f"{reason}; there is no checkpoint to go back to: lower optim.lr or checkpoint.every")
        snapshot = checkpoint.load(found)
        restore(parts.engine, snapshot, parts.corpus, parts.process)
        parts.telemetry.rollback(snapshot.state.step)
        parts.telemetry.say(
            f"warning: {reason}; back to step {snapshot.state.step}, leaving out samples "
            f"{snapshot.state.samples} to {skip_to} of the run"
        )
        progress.step, progress.samples, progress.tokens = snapshot.state.step, skip_to, snapshot.state.tokens
        progress.rollbacks += 1


def give_up_after(parts: Run, step: int) -> None:
    """Remove the checkpoints of later steps, which may hold the spike, wherever they are."""
    checkpoint.remove_after(parts.path / "checkpoints", step)
    try:
        if mirror := open_mirror(parts.config):
            mirror.remove_after(step)
    except UserError as error:
        parts.telemetry.say(f"warning: {error}; checkpoints after step {step} may hold a loss spike: remove them there")


def steps_ahead(parts: Run) -> Generator[list[MicroBatch], None, None]:
    """This rank's micro-batches from where the run stands to its last step."""
    config, process, data = parts.config, parts.process, parts.config.data
    streamed = data.access is Access.stream
    dataset = MicroBatches(
        parts.corpus.directory,
        config.seed,
        Layout(process.rank, process.world_size, config.micro_batch_size, config.global_batch_size),
        parts.progress.samples,
        Streaming(data.path, data.lanes, data.window) if streamed else None,
    )
    stretch, ahead = process.world_size * config.micro_batch_size, range(parts.progress.step, config.steps)
    return training_steps(
        dataset,
        steps=(batch_size(share_done(config, parts.progress), config) // stretch for _ in ahead),
        workers=min(data.workers, 1) if streamed else data.workers,  # a stream fetches by threads
        prefetch=data.prefetch,
        pin_memory=process.device.type == "cuda",
    )


def newest(folder: Path, process: Process) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank."""
    return process.on_main(lambda: checkpoint.newest_verified(folder, lambda text: say(process, f"warning: {text}")))


def restore(engine: Engine, snapshot: Snapshot, corpus: Corpus, process: Process) -> None:
    """Put a checkpoint's state into the engine. Collective."""
    engine.load_full_state(
        snapshot.weights,
        snapshot.moments,
        optimizer_steps=snapshot.state.optimizer_steps,
        loss_scale=snapshot.state.loss_scale,
        sample=corpus.sample_batch().to(process.device),
    )


def resume(
    config: TrainConfig, folder: Path, corpus: Corpus, process: Process, mirror: Mirror | None
) -> Snapshot | None:
    """The newest checkpoint that verifies, here or else in the mirror, if it belongs to this data and order."""
    process.on_main(lambda: checkpoint.clear_unfinished(folder))
    found = newest(folder, process)
    if found is None and mirror:
        say(process, f"{folder}: empty; looking into checkpoint.upload={config.checkpoint.upload}")
        found = process.on_main(lambda: mirror.pull(folder, lambda text: say(process, f"warning: {text}")))
    if found is None:
        return process.on_main(lambda: refuse_lost(folder.parent))
    snapshot = checkpoint.load(found)
    refuse_other_architecture(str(found), snapshot.config_yaml, plain(asdict(config.model)))
    then, now = snapshot.state.identity, Identity.of(config, corpus.manifest, corpus.sha256)
    if then.tokenizer != now.tokenizer:
        raise UserError(
            f"{found}: was trained with tokenizer {then.tokenizer}, {corpus.directory} was prepared with "
            f"{now.tokenizer}: ids would mean other words; prepare with tokenizer.path={folder.parent / 'tokenizer'}"
        )
    if then.optimizer != now.optimizer:
        raise UserError(
            f"{found}: was trained with optim={then.optimizer}, now it is {now.optimizer}: its moments would mean "
            f"something else; restore it, or name another run and add init_from={found}"
        )
    changes = {
        name: f"was trained with {then.tell(name)}, now it is {now.tell(name).partition('=')[2]}"
        for name in RESUME_CHECKS
        if getattr(then, name) != getattr(now, name)
    }
    if refused := changes.keys() - config.resume.allow:
        what, names = "; ".join(changes[name] for name in sorted(refused)), ",".join(sorted(changes))
        raise UserError(f"{found}: {what}: other samples would follow; restore it, or add resume.allow=[{names}]")
    for change in changes.values():
        say(
            process,
            f"warning: {found}: {change}; going on from position {snapshot.state.samples}, as resume.allow says",
        )
    return snapshot


def build_engine(
    config: TrainConfig, corpus: Corpus, process: Process, snapshot: Snapshot | None
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
        check_memory(known, corpus_options(DEFAULTS, corpus.manifest), count, process.world_size, available_gib)
    if config.compile:
        module.compile_layers()
    if snapshot:
        module.load_weights(snapshot.weights)
    elif config.init_from:
        say(process, initialize(module, config.init_from, facts))
    engine = Engine(module, config, process)
    if snapshot:
        restore(engine, snapshot, corpus, process)
    return engine, module.vocab_rows


def describe(
    config: TrainConfig, path: Path, corpus: Corpus, process: Process, engine: Engine, progress: Progress
) -> str:
    """What is about to happen, in three lines."""
    accumulation = accumulation_steps(config.global_batch_size, config.micro_batch_size, process.world_size)
    samples = sum(corpus.pass_sizes)
    epochs = total_samples(config) / max(1, samples / corpus.manifest.passes)
    start = f"resuming at step {progress.step}" if progress.step else "starting"
    end = (
        f"{config.steps}"
        if config.budget.hours is None
        else f"{config.steps} at most, in {config.budget.hours:g} hours"
    )
    ramp = config.batch_ramp
    ramped = f" (from {ramp.start} at first, in {ramp.fraction:.0%} of the run)" if ramp.start else ""
    return (
        f"run {path}: {start} of {end}, "
        f"model {config.model.name} ({engine.num_parameters / 1e6:.1f}M parameters)\n"
        f"data {corpus.directory}: {samples:,} samples of up to {corpus.manifest.max_len} tokens, {epochs:.2f} epochs\n"
        f"{process.world_size} x {process.device.type}, ZeRO {config.zero}, {config.precision.value}: "
        f"global batch {config.global_batch_size} = {process.world_size} ranks x {accumulation} accumulation steps "
        f"x micro-batch {config.micro_batch_size}{ramped}"
    )


def say(process: Process, text: str) -> None:
    if process.is_main:
        print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """Dataclass values as YAML knows them: enums by their value."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


if __name__ == "__main__":
    cli.run("train", TrainConfig, main)
