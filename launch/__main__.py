"""Entry: `python -m launch [check|slurm] [hosts=FILE] … <training overrides>` trains on one machine or many."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cloze import cli
from cloze.errors import ExitCode, UserError
from launch.command import LOCALHOST, Machine, forwarded, free_port, node_command, read_hostfile, this_machine
from launch.options import NAMES, Options, parse
from launch.supervise import Job, supervise
from pretrain.config import TrainConfig, check_ranks

HELP = """python -m launch [check] [hosts=FILE] [option=value ...] [key=value ...]
python -m launch slurm nodes=N gpus_per_node=N time=H:MM:SS [option=value ...] [key=value ...]

Trains with one process per GPU (or up to two on a CPU) on this machine, with slots=N processes on each host of a
hostfile, or as a Slurm job. key=value are training's own overrides; they reach it as they stand, no shell reads them.
Ctrl-C or SIGTERM stops after the step at hand with a checkpoint (exit 75); the same command goes on from there.

  hosts=FILE      DeepSpeed's hostfile: a line `host slots=N` each; ssh must work without a password
  procs=N         processes on this machine, without hosts= [auto]
  restarts=N      start again after a fault of a node or a rank, so often within an hour [3 with hosts=, else 0]
  lost_after=S    seconds without a word after which a node counts as lost [30]
  forward=NAMES   more environment variables for the other hosts, as prefixes: forward=MY_VAR,SENTRY_
  ssh=COMMAND     how to reach a host ['ssh']
  sbatch=OPTIONS  more directives for slurm's script: sbatch='--partition=big --account=me'
  --dry-run       print the deepspeed command of each host (of Slurm: the script) and stop

`check` trains nothing: it compares the hosts (versions, code, configuration, data, clocks, disks, GPUs), sums over all
ranks and measures the links between hosts.
"""


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
        from pretrain.telemetry.sinks import raise_alert

        raise_alert(config, run_dir, story)

    return Job(
        overrides=overrides,
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
    command = partial(node_command, job.overrides, hosts=job.hosts, module=job.module)
    if list(job.hosts) == [LOCALHOST]:
        return str(command(machine=this_machine(), port=free_port()))
    lines = []
    for rank, (host, slots) in enumerate(job.hosts.items()):
        machine = Machine(gpus=tuple(range(slots or 1)), cpus=slots or 1)
        lines.append(f"{host}: {command(machine=machine, node_rank=rank, master=next(iter(job.hosts)), port=29500)}")
    return "\n".join([*lines, "forwarded: " + (" ".join(sorted(job.environment)) or "nothing")])


@cli.overrides_command(TrainConfig)
def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        print(cli.help_text("train", TrainConfig))
        return ExitCode.OK
    what = next((argument for argument in arguments if argument in ("check", "slurm")), None)
    options = parse([argument for argument in arguments if argument != what], slurm=what == "slurm")
    config = cli.compose("train", TrainConfig, options.overrides, NAMES)  # a typo is told once, not by every rank
    if what == "slurm":
        from launch.slurm import submit

        return submit(options, config)
    job = job_of(options, config)
    if what == "check":
        from launch.preflight.check import check, measuring

        if not options.dry_run:
            return check(job, config)
        job = measuring(job, config)
    if options.dry_run:
        print(dry_run(job))
        return ExitCode.OK
    return supervise(job)


if __name__ == "__main__":
    sys.exit(main())
