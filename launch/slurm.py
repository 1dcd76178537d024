"""`python -m launch slurm …`: a batch script for Slurm, and what each of its tasks does first.

srun starts the ranks itself, one task per GPU: there is no ssh, no hostfile and no agent, since Slurm ends a step's
tasks when one fails (--kill-on-bad-exit), signals them before the time is up (--signal), and starts a job again when a
node dies (--requeue). A run that stopped with a checkpoint goes back into the queue by itself: its tasks end with 0,
since Slurm would kill those that are still ending after the first 75, and the script looks into status.json.

The script is bash, written by us with every word quoted; srun hands overrides to the tasks without a shell.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cloze.arrival import checksum
from cloze.errors import ExitCode, UserError
from cloze.files import write_whole
from cloze.log import log, verbosity
from cloze.ownership import require_own_file
from launch.agent import STATUS_NAME
from launch.command import TRAINING_MODULE
from launch.options import Options
from pretrain.config import TrainConfig, check_ranks

SCRIPT_NAME = "job.sbatch"
_MARK = "# Written by python -m launch slurm"

_REQUEUE_SECONDS = 60  # within which Slurm does it
_STOP_SECONDS_BEFORE = 120  # the ranks get SIGUSR1 so long before their time is up
_LEAST_SECONDS = 600  # of a job: less leaves nothing to train in


def script(options: Options, config: TrainConfig, folder: Path) -> str:
    """The batch script. Raises `UserError` for a time that is none, and where the batch does not fit the ranks."""
    if seconds_of(options.time) < _LEAST_SECONDS:
        raise UserError(
            f"time={options.time}: too short: ranks stop {_STOP_SECONDS_BEFORE} s before its end, and the job would be "
            f"queued again for ever; give {_LEAST_SECONDS // 60} minutes at least"
        )
    ranks = options.nodes * options.gpus_per_node
    check_ranks(config, ranks)
    directives = [
        f"--job-name=cloze-{re.sub(r'[^A-Za-z0-9._-]', '_', config.run)}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node}",
        f"--gpus-per-node={options.gpus_per_node}",
        f"--cpus-per-task={2 + config.data.workers}",  # the rank, what it does in the background, its loaders
        f"--time={options.time}",
        f"--signal=USR1@{_STOP_SECONDS_BEFORE}",
        "--requeue",
        "--open-mode=append",
        f"--output={_pattern(folder)}/slurm-%j.log",
        *map(shlex.quote, options.sbatch),
    ]
    words = [f"world_size={ranks}", *options.overrides]
    task = shlex.join([sys.executable, "-m", "launch.slurm", *words, checksum(words), *verbosity()])
    status = shlex.quote(str(folder.absolute() / STATUS_NAME))
    stopped = f"""[ "$code" = 0 ] && grep -q '"exit_code": {ExitCode.STOPPED.value},' {status}"""
    # Slurm ends a script that is queued again. One that ended by itself before that would be a job that failed.
    again = f'scontrol requeue "$SLURM_JOB_ID" && sleep {_REQUEUE_SECONDS}'
    requeue = f'if [ "$code" = {ExitCode.STOPPED.value} ]; then {again}; fi'
    return "\n".join(
        [
            "#!/bin/bash",
            _MARK,
            *(f"#SBATCH {directive}" for directive in directives),
            f"cd {shlex.quote(str(Path.cwd()))} || exit {ExitCode.USAGE.value}",
            'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',  # srun does not take it from sbatch
            f"srun --kill-on-bad-exit=1 --wait={_STOP_SECONDS_BEFORE} {task}",
            "code=$?",
            f"if {stopped}; then code={ExitCode.STOPPED.value}; fi",
            *([requeue] if config.stop_at is None else []),  # with stop_at it would stop at once, again and again
            'exit "$code"',
            "",
        ]
    )


def seconds_of(time: str) -> int:
    """Slurm's notation of a time limit, but for its MM:SS, which most people mean to be hours. Raises `UserError`."""
    match = re.fullmatch(r"(\d+)|(?:(\d+)-)?(\d+):(\d\d):(\d\d)|(\d+)-(\d+)(?::(\d\d))?", time)
    if not match:
        raise UserError(f"time={time}: must be minutes, H:MM:SS or D-HH:MM:SS; add time=24:00:00, say")
    lone, days, hours, minutes, seconds, *short = (int(part or 0) for part in match.groups())
    return 60 * (lone + minutes + short[2] + 60 * (hours + short[1] + 24 * (days + short[0]))) + seconds


def _pattern(folder: Path) -> str:
    """A path for sbatch's --output, where % and blanks mean something."""
    path = str(folder.absolute()).replace("%", "%%")
    if re.search(r"[\s\\'\"]", path):
        raise UserError(f"{path}: sbatch takes no blanks or quotes in the path of its log; choose another runs_root")
    return path


def submit(options: Options, config: TrainConfig) -> int:
    """Write the script into the run directory and hand it to sbatch. Raises `UserError` where sbatch refuses."""
    folder = Path(config.runs_root) / config.run
    text = script(options, config, folder)
    if options.dry_run:
        print(text, end="")
        return ExitCode.OK
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SCRIPT_NAME
    require_own_file(path, (_MARK, "-m launch.slurm "))  # the second: of earlier versions
    write_whole(path, text.encode())
    try:
        done = subprocess.run(["sbatch", str(path)], check=False)
    except FileNotFoundError:
        raise UserError(f"sbatch: not found; submit {path} where Slurm is") from None
    if done.returncode:
        raise UserError(f"sbatch refused {path} (see above); correct nodes, time or sbatch='--partition=…'")
    return ExitCode.OK


def main(overrides: Sequence[str]) -> None:
    """Become the training process of this Slurm task. An orderly stop ends with 0: see above."""
    if "SLURM_STEP_NODELIST" not in os.environ:
        log.error("SLURM_STEP_NODELIST is not set: srun starts this, from the script of `launch slurm`")
        sys.exit(ExitCode.USAGE)
    sys.argv[1:] = overrides
    try:
        runpy.run_module(TRAINING_MODULE, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        sys.exit(ExitCode.OK if stop.code == ExitCode.STOPPED else stop.code)


if __name__ == "__main__":
    main(sys.argv[1:])
