"""After a loss spike: back to the last checkpoint from before it, and on with the samples after it."""

from contextlib import closing

from cloze.errors import ExitCode, TrainingError, UserError
from pretrain import checkpoint
from pretrain.loop import steps_ahead, train, wait_for_writer
from pretrain.metrics import LossSpike
from pretrain.resume import newest, restore
from pretrain.session import Session


def train_with_rollbacks(session: Session) -> ExitCode:
    """Train to the end. Raises `TrainingError` where going back does not help, or there is nothing to go back to."""
    while True:
        try:
            with closing(steps_ahead(session)) as steps:  # ends the loader's processes, whatever happens
                return train(session, steps)
        except LossSpike as spike:
            most = session.config.guard.max_rollbacks
            if session.progress.rollbacks >= most:
                raise TrainingError(f"{spike}; {most} rollbacks did not help: lower optim.lr") from spike
            reason, sound_step = str(spike), spike.sound_step
        wait_for_writer(session)
        roll_back(session, sound_step, reason)


def roll_back(session: Session, sound_step: int, reason: str) -> None:
    """Restore the newest checkpoint up to `sound_step`; the samples since then are left out. Collective."""
    progress, process = session.progress, session.process
    process.on_main(lambda: remove_after(session, sound_step))
    found = newest(session.path / "checkpoints", process)
    if found is None:
        raise TrainingError(f"{reason}; there is no checkpoint to go back to: lower optim.lr or checkpoint.every")
    snapshot = checkpoint.load(found)
    restore(session.engine, snapshot, session.corpus, process)
    session.telemetry.rollback(snapshot.state.step)
    process.log.warning(
        f"{reason}; back to step {snapshot.state.step}, leaving out samples "
        f"{snapshot.state.samples} to {progress.samples} of the run"
    )
    progress.step, progress.tokens = snapshot.state.step, snapshot.state.tokens
    progress.rollbacks += 1


def remove_after(session: Session, step: int) -> None:
    """Remove the checkpoints of later steps, which may hold the spike, wherever they are."""
    checkpoint.remove_after(session.path / "checkpoints", step)
    try:
        if session.mirror:
            session.mirror.remove_after(step)
    except UserError as error:
        session.process.log.warning(f"{error}; checkpoints after step {step} may hold a loss spike: remove them there")
