"""One process of a run, from joining the group to leaving it: session.py makes the parts of it, loop.py runs them."""

import shlex
from pathlib import Path

from cloze.errors import ExitCode, UserError
from pretrain import dist
from pretrain.branch import open_branch
from pretrain.checkpoint import path_of
from pretrain.checkpoint.mirror import open_mirror
from pretrain.config import TrainConfig
from pretrain.resume import Run, find_snapshot, with_choices_of
from pretrain.rollback import train_with_rollbacks
from pretrain.session import Job, enter_phase, open_job, open_session


def train(config: TrainConfig) -> int:
    """Train as `config` says, as one rank of the group; the exit code."""
    try:
        with open_job(config) as job:
            run(job)
    except UserError as error:
        if error.exit_code is ExitCode.USAGE and not error.one_rank_only:
            dist.finish()  # every rank is refused alike; where one is gone, leaving might wait for it
        raise
    dist.finish()
    return int(job.code)


def run(job: Job) -> None:
    """Resume if there is something to resume, build the parts, train."""
    with dist.translate_peer_loss(job.peers.told):
        _run(job)


def _run(job: Job) -> None:
    config, process = job.config, job.process
    assert job.corpus
    mirror = open_mirror(config)
    run = Run(job.phases, job.identity, job.corpus.directory)
    snapshot = find_snapshot(config, job.path / "checkpoints", run, process, mirror)
    snapshot = snapshot or open_branch(config, run, process)
    if snapshot:
        job.progress.resume(snapshot)
        job.set_config(with_choices_of(config, snapshot, precision_is_open=job.precision_is_open))
        config = job.config
    if job.progress.step >= config.steps:
        process.log.info(
            f"{job.path}: already at step {job.progress.step} of {config.steps}; raise steps, or name another run; "
            f"next: {export_command(job.path)}"
        )
        if mirror:  # an earlier start may have had no time for it
            process.on_main(lambda: mirror.push(path_of(job.path / "checkpoints", job.progress.step)))
        job.code = ExitCode.OK
        return
    if snapshot and job.progress.budget_spent(config) >= 1.0:
        process.log.info(
            f"{job.path}: budget.hours={config.budget.hours} is spent, at step {job.progress.step}; raise it"
        )
        job.code = ExitCode.OK
        return
    with open_session(job, snapshot, mirror) as session:
        job.code = train_with_rollbacks(session)
        while job.code == ExitCode.OK and session.phase.number < len(job.phases):
            session = enter_phase(session, job)
            job.code = train_with_rollbacks(session)
        process.on_main(session.writer.close)
    process.log.info(closing_line(job.path, job.code, job.progress.step, config.steps))
    process.barrier()  # launchers kill the others soon after the first rank that leaves, and rank 0 may need minutes


def closing_line(path: Path, code: int, step: int, steps: int) -> str:
    """Where an orderly run stands at its end, what is saved, and what to do next."""
    saved = f"step {step} of {steps} is saved in {path / 'checkpoints'}"
    if code == ExitCode.STOPPED:
        return f"{path}: stopped; {saved}; the same command goes on"
    return f"{path}: finished; {saved}; next: {export_command(path)}"


def export_command(path: Path) -> str:
    """What makes a model of the run, as a shell takes it."""
    return shlex.join(("python", "-m", "pretrain.export", str(path), f"out/{path.name}"))
