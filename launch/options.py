"""The command line of `python -m launch`: its own options, and the overrides that are training's."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.errors import UserError

LOST_AFTER_SECONDS = 30.0  # ranks then outlive a lost peer by that and twice an agent's grace at most: under a minute

HELP = """python -m launch [check] [hosts=FILE] [option=value ...] [key=value ...]
python -m launch slurm nodes=N gpus_per_node=N time=H:MM:SS [option=value ...] [key=value ...]
python -m launch quote [hosts=FILE] [key=value ...]

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
ranks and measures the links between hosts. `quote` prints the command for plain `deepspeed` whose overrides survive the
shells that its pdsh hands them to, and that tells where one did not.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks of launch itself, and the rest."""

    hosts: Path | None = None
    procs: int | None = None  # None: as many as there are devices
    restarts: int | None = None
    lost_after: float = LOST_AFTER_SECONDS
    forward: tuple[str, ...] = ()
    ssh: tuple[str, ...] = ("ssh",)
    nodes: int = 1
    gpus_per_node: int = 1
    time: str = ""
    sbatch: tuple[str, ...] = ()
    dry_run: bool = False
    overrides: tuple[str, ...] = ()


_READERS: dict[str, Callable[[str], Any]] = {
    "hosts": Path,
    "procs": lambda value: None if value == "auto" else _at_least(1, value),
    "restarts": lambda value: _at_least(0, value),
    "lost_after": lambda value: float(_at_least(3, value)),
    "forward": lambda value: tuple(filter(None, value.split(","))),
    "ssh": lambda value: tuple(shlex.split(value)),
}
_SLURM_READERS: dict[str, Callable[[str], Any]] = {
    "nodes": lambda value: _at_least(1, value),
    "gpus_per_node": lambda value: _at_least(1, value),
    "time": str,
    "sbatch": lambda value: tuple(shlex.split(value)),
}
NAMES = (*_READERS, *_SLURM_READERS)


def parse(arguments: Sequence[str], *, slurm: bool = False) -> Options:
    """Raises `UserError` for anything that is neither ours nor an override."""
    readers, others = (_SLURM_READERS, _READERS) if slurm else (_READERS, _SLURM_READERS)
    own: dict[str, Any] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, given, value = argument.partition("=")
        if argument == "--dry-run":
            own["dry_run"] = True
        elif given and key in readers:
            if not value.strip() and key not in ("forward", "sbatch"):
                raise UserError(f"{argument}: empty (is a variable of the shell unset?); give it a value")
            try:
                own[key] = readers[key](value)
            except ValueError as error:
                raise UserError(f"{argument}: {error}; correct it (--help)") from error
        elif given and key in others:
            whose = "not of `launch slurm`" if slurm else "only of `launch slurm`"
            raise UserError(f"{key}: an option {whose}; there are {', '.join(readers)} here")
        elif argument.startswith("-"):
            raise UserError(f"{argument}: not an option of launch; see --help")
        else:
            overrides.append(argument)
    return Options(**own, overrides=tuple(overrides))


def _at_least(least: int, value: str) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"must be a whole number from {least}")
    return int(value)
