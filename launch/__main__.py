"""Entry: `python -m launch [check|slurm|quote] [hosts=FILE] … <training overrides>` trains on one machine or many."""

import sys
from collections.abc import Sequence

from cloze import cli
from cloze.errors import ExitCode
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
    return supervise(job)


if __name__ == "__main__":
    sys.exit(main())
