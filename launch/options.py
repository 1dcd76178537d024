"""The command line of `python -m launch`: its own options, and the overrides that are training's."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.errors import UserError
from launch.supervise import LOST_AFTER_SECONDS


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
            raise UserError(f"{argument}: not an option of launch; use it with `python -m pretrain.train`")
        else:
            overrides.append(argument)
    return Options(**own, overrides=tuple(overrides))


def _at_least(least: int, value: str) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"must be a whole number from {least}")
    return int(value)
