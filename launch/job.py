"""What launch is to run, where, and how long to insist: a `Job`, from the command line and training's configuration."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cloze.errors import UserError
from cloze.log import verbosity
from launch.command import (
    LOCALHOST,
    TRAINING_MODULE,
    Machine,
    NodeStart,
    forwarded,
    free_port,
    node_command,
    read_hostfile,
    this_machine,
)
from launch.options import LOST_AFTER_SECONDS, Options
from pretrain.config import TrainConfig, check_ranks


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run where, and how long to insist."""

    overrides: tuple[str, ...]
    hosts: Mapping[str, int | None]  # name -> processes; None, for a single host: as many as it has devices
    run_dir: str | None = None
    fits: Callable[[int], bool] = lambda ranks: True  # whether the run can go on with so many
    module: str = TRAINING_MODULE
    environment: Mapping[str, str]
    ssh: tuple[str, ...] = ("ssh",)
    restarts: int = 0  # at most, within an hour
    stops: bool = False  # training may stop without being asked (stop_at); else who stops is started again
    lost_after: float = LOST_AFTER_SECONDS  # without a word for so long a node, or launch, is taken for lost
    alert: Callable[[str], None] = lambda story: None  # called where a fault ends the run


def job_of(options: Options, config: TrainConfig) -> Job:
    """The job on this machine, or on the hosts of the hostfile. Raises `UserError` where the batch does not fit."""
    hosts: dict[str, int | None] = {LOCALHOST: options.procs}
    overrides, run_dir = options.overrides, Path(config.runs_root) / config.run
    if options.hosts:
        if options.procs:
            raise UserError(f"procs={options.procs}: the hostfile tells how many; write slots=N there")
        slots = read_hostfile(options.hosts)
        hosts = dict(slots)
        check_ranks(config, sum(slots.values()))
        # Fewer hosts may be left.
        overrides = tuple(one for one in overrides if not one.lstrip("+").startswith("world_size="))

    def fits(ranks: int) -> bool:
        try:
            check_ranks(replace(config, world_size=None), ranks)
        except UserError:
            return False
        return True

    def alert(story: str) -> None:
        from pretrain.telemetry.wandb_sink import raise_alert

        raise_alert(config, run_dir, story)

    return Job(
        overrides=(*overrides, *verbosity()),
        hosts=hosts,
        run_dir=str(run_dir),
        fits=fits,
        alert=alert,
        environment=forwarded(os.environ, options.forward),
        ssh=options.ssh,
        restarts=(3 if options.hosts else 0) if options.restarts is None else options.restarts,
        lost_after=options.lost_after,
        stops=config.stop_at is not None,
    )


def dry_run(job: Job) -> str:
    """What each host would run. Of a remote one we assume that it has the GPUs, and any free port."""
    start = NodeStart(overrides=job.overrides, hosts=job.hosts, module=job.module, port=29500)
    if list(job.hosts) == [LOCALHOST]:
        return str(node_command(replace(start, port=free_port()), this_machine()))
    lines = []
    for rank, (host, slots) in enumerate(job.hosts.items()):
        machine = Machine(gpus=tuple(range(slots or 1)), cpus=slots or 1)
        here = replace(start, node_rank=rank, master=next(iter(job.hosts)))
        lines.append(f"{host}: {node_command(here, machine)}")
    return "\n".join([*lines, "forwarded: " + (" ".join(sorted(job.environment)) or "nothing")])
