"""Entry: `python -m launch [check|slurm|quote] [hosts=FILE] … <training overrides>` trains on one machine or many."""

import shlex
import sys
from collections.abc import Sequence

from cloze import cli
from cloze.corpus.manifest import read_manifest
from cloze.errors import ExitCode, UserError
from cloze.log import log
from cloze.storage import is_remote, local_path
from launch.command import plain_deepspeed
from launch.job import dry_run, job_of
from launch.options import HELP, NAMES, parse
from launch.supervise import supervise
from pretrain.config import TrainConfig

_WHAT = ("check", "slurm", "quote")


@cli.overrides_command(TrainConfig, once=True)
def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        print(cli.help_text("train", TrainConfig))
        return ExitCode.OK
    _refuse_sweeps(arguments)
    cli.refuse_options(TrainConfig, arguments, ("--dry-run", *NAMES))
    what = next((argument for argument in arguments if argument in _WHAT), None)
    options = parse([argument for argument in arguments if argument != what], slurm=what == "slurm")
    # here, too: a typo is told once, not by every rank
    config = cli.compose("train", TrainConfig, options.overrides, (*NAMES, *_WHAT))
    if what == "slurm":
        from launch.slurm import submit

        return submit(options, config)
    if what == "quote":
        print(plain_deepspeed(options.overrides, options.hosts))
        return ExitCode.OK
    job = job_of(options, config)
    if what == "check":
        from launch.preflight.check import check, measuring

        if not options.dry_run:
            return check(job, config)
        job = measuring(job, config)
    if options.dry_run:
        print(dry_run(job))
        return ExitCode.OK
    if options.hosts is None:
        _require_corpora(config)
        log.info("starting: torch and DeepSpeed take a moment")
    return supervise(job)


def _refuse_sweeps(arguments: Sequence[str]) -> None:
    """Raises `UserError`, with the command that sweeps."""
    if {"--multirun", "-m"} & {*arguments}:
        theirs = [
            one for one in arguments if one.partition("=")[0] not in (*NAMES, *_WHAT, "--dry-run", "-m", "--multirun")
        ]
        sweep = shlex.join(["deepspeed", "--module", "pretrain.train", *theirs, "--multirun"])
        raise UserError(f"--multirun: launch trains one run at a time; write {sweep}")


def _require_corpora(config: TrainConfig) -> None:
    """Raises `UserError` where a corpus of this machine is not there: before each process says so, a minute later."""
    for part in config.data.parts:
        if not is_remote(part.path):
            read_manifest(local_path(part.path))


if __name__ == "__main__":
    sys.exit(main())
