"""Going on from a checkpoint: which one, whether it belongs to this run, and its state into the engine."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import yaml

from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.changes import refuse_other_architecture
from pretrain.checkpoint import Snapshot
from pretrain.checkpoint.mirror import Mirror
from pretrain.config import RESUME_CHECKS, Identity, Precision, TrainConfig, as_data
from pretrain.data.loader import TrainingCorpus
from pretrain.dist import Process
from pretrain.engine.engine import Engine
from pretrain.phases import Phase, phase_before
from pretrain.run_directory import refuse_lost


class Run(NamedTuple):
    """What a checkpoint must belong to."""

    phases: Sequence[Phase]
    identity: Identity
    corpus: Path  # for people


def find_snapshot(
    config: TrainConfig, folder: Path, run: Run, process: Process, mirror: Mirror | None
) -> Snapshot | None:
    """The newest checkpoint that verifies, here or else in the mirror, if it belongs to this data and order."""
    process.on_main(lambda: checkpoint.clear_unfinished(folder))
    found = newest(folder, process)
    if found is None and mirror:
        process.log.info(f"{folder}: empty; looking into checkpoint.upload={config.checkpoint.upload}")
        found = process.on_main(lambda: mirror.pull(folder, process.log.warning))
    if found is None:
        process.on_main(lambda: refuse_lost(folder.parent))
        return None
    return load_for(config, found, run, process)


def load_for(config: TrainConfig, found: Path, run: Run, process: Process) -> Snapshot:
    """The checkpoint `found`. Raises `UserError` where this configuration cannot go on from it on this data."""
    snapshot = checkpoint.load(found)
    model = phase_before(run.phases, snapshot.state.step).config.model
    refuse_other_architecture(str(found), snapshot.config_yaml, as_data(asdict(model)))
    for change in check_identity(found, snapshot.state.identity, run.identity, run.corpus, config.resume.allow):
        process.log.warning(f"{found}: {change}; going on from position {snapshot.state.samples}, as resume.allow says")
    return snapshot


def with_choices_of(config: TrainConfig, snapshot: Snapshot, *, precision_is_open: bool) -> TrainConfig:
    """The configuration in which what the user left open is as it was in the run that wrote the checkpoint.

    A rate by the model's width, or the precision that suits a device, may be another one on this machine, or in this
    version of Cloze; a run goes on with its own.
    """
    then = yaml.safe_load(snapshot.config_yaml) or {}
    optim = then.get("optim", {})
    if config.optim.lr_is_default and optim.get("kind") == config.optim.kind and isinstance(optim.get("lr"), float):
        config = replace(config, optim=replace(config.optim, lr=optim["lr"]))
    precision = then.get("precision")
    if precision_is_open and precision in {known.value for known in Precision if known is not Precision.auto}:
        config = replace(config, precision=Precision(precision))
    return config


def newest(folder: Path, process: Process) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank."""
    return process.on_main(lambda: checkpoint.newest_verified(folder, process.log.warning))


def check_identity(path: Path, then: Identity, now: Identity, corpus: Path, allow: list[str]) -> list[str]:
    """What differs from the run that wrote the checkpoint `path`. Raises `UserError` unless `allow` names all of it."""
    if then.tokenizer != now.tokenizer:
        raise UserError(
            f"{path}: was trained with tokenizer {then.tokenizer}, {corpus} was prepared with "
            f"{now.tokenizer}: ids would mean other words; prepare with tokenizer.path={path.parents[1] / 'tokenizer'}"
        )
    if then.optimizer != now.optimizer:
        raise UserError(
            f"{path}: was trained with optim={then.optimizer}, now it is {now.optimizer}: its moments would mean "
            f"something else; restore it, or name another run and add init_from={path}"
        )
    changes = {
        name: f"was trained with {then.describe(name)}, now it is {now.describe(name).partition('=')[2]}"
        for name in RESUME_CHECKS
        if getattr(then, name) != getattr(now, name)
    }
    if refused := changes.keys() - set(allow):
        what, names = "; ".join(changes[name] for name in sorted(refused)), ",".join(sorted(changes))
        raise UserError(f"{path}: {what}: other samples would follow; restore it, or add resume.allow=[{names}]")
    return list(changes.values())


def restore(engine: Engine, snapshot: Snapshot, corpus: TrainingCorpus, process: Process) -> None:
    """Put a checkpoint's state into the engine. Collective."""
    engine.load_full_state(
        snapshot.weights,
        snapshot.moments,
        optimizer_steps=snapshot.state.optimizer_steps,
        loss_scale=snapshot.state.loss_scale,
        sample=corpus.sample_batch().to(process.device),
    )
