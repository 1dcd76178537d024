"""`python -m launch slurm …`: a batch script for Slurm, and what each of its tasks does first.

srun starts the ranks itself, one task per GPU: there is no ssh, no hostfile and no agent, since Slurm ends a step's
tasks when one fails (--kill-on-bad-exit), signals them before the time is up (--signal), and starts a job again when a
node dies (--requeue). A run that stopped with a checkpoint (exit 75) goes back into the queue by itself.

The script is bash, written by us with every word quoted; srun hands overrides to the tasks without a shell.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import ExitCode, UserError
from launch.command import TRAINING_MODULE
from pretrain.config import TrainConfig, accumulation_steps

if TYPE_CHECKING:
    from launch.__main__ import Options

SCRIPT_NAME = "job.sbatch"

_STOP_SECONDS_BEFORE = 120  # the ranks get SIGUSR1 so long before their time is up
_FIRST_PORT, _PORTS = 20_000, 20_000


def script(options: "Options", config: TrainConfig, folder: Path) -> str:
    """The batch script. Raises `UserError` for a time that is none, and where the batch does not fit the ranks."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", options.time):
        raise UserError(f"time={options.time}: must be minutes, H:MM:SS or D-HH:MM:SS; add time=24:00:00, say")
    ranks = options.nodes * options.gpus_per_node
    accumulation_steps(config.global_batch_size, config.micro_batch_size, ranks)
    directives = [
        f"--job-name=cloze-{re.sub(r'[^A-Za-z0-9._-]', '_', config.run)}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node}",
        f"--gpus-per-node={options.gpus_per_node}",
        f"--time={options.time}",
        f"--signal=USR1@{_STOP_SECONDS_BEFORE}",
        "--requeue",
        "--open-mode=append",
        f"--output={_pattern(folder)}/slurm-%j.log",
        *options.sbatch,
    ]
    task = shlex.join(
        [sys.executable, "-m", "launch.slurm", f"world_size={ranks}", *options.overrides],
    )
    requeue = f'if [ "$code" = {ExitCode.STOPPED.value} ]; then scontrol requeue "$SLURM_JOB_ID"; fi'
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            f"cd {shlex.quote(str(Path.cwd()))} || exit {ExitCode.USAGE.value}",
            f"srun --kill-on-bad-exit=1 --wait={_STOP_SECONDS_BEFORE} {task}",
            "code=$?",
            *([requeue] if config.stop_at is None else []),  # with stop_at it would stop at once, again and again
            'exit "$code"',
            "",
        ]
    )


def _pattern(folder: Path) -> str:
    """A path for sbatch's --output, where % and blanks mean something."""
    path = str(folder.absolute()).replace("%", "%%")
    if re.search(r"[\s\\'\"]", path):
        raise UserError(f"{path}: sbatch takes no blanks or quotes in the path of its log; choose another runs_root")
    return path


def submit(options: "Options", config: TrainConfig) -> int:
    """Write the script into the run directory and hand it to sbatch. Raises `UserError` where sbatch refuses."""
    folder = Path(config.runs_root) / config.run
    text = script(options, config, folder)
    if options.dry_run:
        print(text, end="")
        return ExitCode.OK
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SCRIPT_NAME
    path.write_text(text, encoding="utf-8")
    try:
        done = subprocess.run(["sbatch", str(path)], check=False)
    except FileNotFoundError:
        raise UserError(f"sbatch: not found; submit {path} where Slurm is") from None
    if done.returncode:
        raise UserError(f"sbatch refused {path} (see above); correct nodes, time or sbatch='--partition=…'")
    return ExitCode.OK


def rank_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """torch's names for what Slurm says of a task. Raises `UserError` outside of a Slurm step."""
    try:
        return {
            "RANK": slurm["SLURM_PROCID"],
            "LOCAL_RANK": slurm["SLURM_LOCALID"],
            "WORLD_SIZE": slurm["SLURM_NTASKS"],
            "MASTER_ADDR": first_host(slurm["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(_FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % _PORTS),
        }
    except KeyError as error:
        raise UserError(f"{error.args[0]} is not set: srun starts this, from the script of `launch slurm`") from error


def first_host(nodelist: str) -> str:
    """The first name of Slurm's compressed list: `gpu[003-004,7],login1` gives gpu003."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    assert match
    return "".join(part or "" for part in match.groups())


def main(overrides: Sequence[str]) -> None:
    """Become the training process of this Slurm task."""
    try:
        os.environ.update(rank_variables(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.argv[1:] = overrides
    runpy.run_module(TRAINING_MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
