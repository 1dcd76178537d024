"""`branch_from=`: a run that begins where another one stands, optimizer, step and samples included, to end otherwise.

From one long run at a constant rate a decay can branch off at any checkpoint, as often as one likes: each gives the
model that a run of that length would have given (Hägele et al. 2024; Hu et al. 2024). The other run is only read.
"""

from dataclasses import replace

import yaml

from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.changes import JUMP
from pretrain.checkpoint import Snapshot
from pretrain.config import TrainConfig
from pretrain.dist import Process
from pretrain.optim.options import OptimConfig
from pretrain.optim.schedule import learning_rate
from pretrain.optim.schedules import ScheduleConfig
from pretrain.resume import Run, load_for


def open_branch(config: TrainConfig, run: Run, process: Process) -> Snapshot | None:
    """The checkpoint that `branch_from` names, for a run that has none of its own yet. Collective.

    Raises `UserError` where it is none, where the run would end before it, and whatever a resume would refuse.
    """
    source = config.branch_from
    if source is None:
        return None
    if config.init_from:
        raise UserError(
            f"branch_from={source}: goes on from its own weights, not from init_from; leave out one of them"
        )
    found = process.on_main(lambda: checkpoint.named_by("branch_from", source))
    if found is None:
        raise UserError(
            f"branch_from={source}: neither a run nor a checkpoint; name a run's directory, or one below it"
        )
    snapshot = load_for(config, found, run, process)
    step = snapshot.state.step
    if step >= config.steps:
        raise UserError(
            f"branch_from={found}: is of step {step}, and the run would end at steps={config.steps}; raise it"
        )
    process.log.info(f"branching off {found}: on from sample {snapshot.state.samples:,} of the order")
    if len(run.phases) == 1 and (jump := _jump(config, snapshot)):
        process.log.warning(jump)
    return snapshot._replace(state=replace(snapshot.state, wandb_id=None))  # the other run's


def _jump(config: TrainConfig, snapshot: Snapshot) -> str | None:
    """A warning where the rate here is not what it was there: a decay that would have begun before the branch."""
    step, before = snapshot.state.step, _last_rate(snapshot)
    if config.budget.hours or not before:
        return None
    now = learning_rate(step, config.steps, config.optim, config.schedule)
    if max(now, before) <= JUMP * min(now, before):
        return None
    left = (config.steps - step) / config.steps
    return (
        f"the learning rate jumps from {before:.1e} to {now:.1e} at step {step}, where the run branches off; to decay "
        f"from there give schedule=wsd_sqrt schedule.decay_fraction={left:.4g}, and the same optim.lr"
    )


def _last_rate(snapshot: Snapshot) -> float | None:
    """Learning rate of the step before the checkpoint, in its own run; None under a time budget, or if it cannot tell.

    An older version's configuration may lack a key, or hold one that is no more.
    """
    try:
        then = yaml.safe_load(snapshot.config_yaml)
        optim, schedule = (
            base.kinds[then[name]["kind"]](**then[name])
            for name, base in (("optim", OptimConfig), ("schedule", ScheduleConfig))
        )
        return (
            None if then["budget"]["hours"] else learning_rate(snapshot.state.step - 1, then["steps"], optim, schedule)
        )
    except (KeyError, TypeError, UserError):
        return None
