"""Entry: `python -m launch [procs=auto|N] [--dry-run] <training overrides>` trains on all devices of this machine."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep import entry
from data_prep.errors import ExitCode, UserError
from launch.command import deepspeed_command, free_port, this_machine
from launch.supervise import run
from pretrain.config import TrainConfig

_HELP = """python -m launch [procs=auto|N] [--dry-run] [key=value ...]

Trains on this machine with one process per GPU, or up to two on a CPU. key=value are training's own overrides; they
reach it as they stand, no shell reads them. Ctrl-C or SIGTERM stops after the step at hand with a checkpoint (exit 75);
the same command goes on from there.

  procs=N     processes to start [auto]
  --dry-run   print the deepspeed command and stop
"""


class Options(NamedTuple):
    """What the command line asks of launch itself, and the rest."""

    procs: int | None  # None: as many as there are devices
    dry_run: bool
    overrides: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Options:
    """Raises `UserError` for anything that is neither ours nor an override."""
    procs: int | None = None
    dry_run = False
    overrides: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument == "--dry-run":
            dry_run = True
        elif key == "procs":
            procs = _procs(value)
        elif argument.startswith("-"):
            raise UserError(f"{argument}: not an option of launch; use it with `python -m pretrain.train`")
        else:
            overrides.append(argument)
    return Options(procs, dry_run, tuple(overrides))


def _procs(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"procs={value}: must be auto or a number of processes")
    return int(value)


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        print(entry.help_text("train", TrainConfig))
        return ExitCode.OK
    options = parse(arguments)
    config = entry.compose("train", TrainConfig, options.overrides)  # a typo is told once, not by every rank
    command = deepspeed_command(options.overrides, this_machine(), procs=options.procs, port=free_port())
    if options.dry_run:
        print(command)
        return ExitCode.OK
    return run(command, Path(config.runs_root) / config.run)


if __name__ == "__main__":
    sys.exit(entry.guarded(lambda: main(sys.argv[1:]), TrainConfig))
