"""Running a training command to its end: signals, orphans, and the true exit code.

deepspeed's launcher is not to be trusted with any of the three: SIGTERM to its outer process leaves the ranks running,
to its inner one it reaches them 30 s apart, and when that one is killed the outer returns 0. So the command gets a
session of its own, signals go to the ranks themselves, and the exit code is the one that training wrote down.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from data_prep.errors import ExitCode
from launch.command import Command

STATUS_NAME = "status.json"

_POLL_SECONDS = 0.2
_LEFT_BEHIND_SECONDS = 20.0  # for ranks that outlive their launcher to end by SIGTERM
_KILL_SECONDS = 5.0


def run(command: Command, run_dir: Path) -> int:
    """Run `command`, which trains in `run_dir`, and return training's own exit code.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks every rank to stop in an orderly way; the second kills. When this
    returns or raises, no process of the command is left.
    """
    status = run_dir / STATUS_NAME
    status.unlink(missing_ok=True)
    process = subprocess.Popen(
        command.arguments, env=command.full_environment(), stdin=subprocess.DEVNULL, start_new_session=True
    )
    stop = _Stop(process)
    try:
        with stop.on_signals():
            while process.poll() is None:
                stop.forward()
                time.sleep(_POLL_SECONDS)
    finally:
        _clear(process)
    return true_exit_code(status, process.returncode, stop_requested=stop.asked == 1)


def true_exit_code(status: Path, launcher_code: int, *, stop_requested: bool) -> int:
    """Training's exit code: what it wrote, else what the launcher says if that is a code of ours, else 70.

    A run that was asked to stop before it could write anything counts as stopped: the same command goes on.
    """
    try:
        return int(json.loads(status.read_bytes())["exit_code"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {status}: unreadable ({error}); calling the run failed", file=sys.stderr)
        return int(ExitCode.FAILED)
    if stop_requested:
        return int(ExitCode.STOPPED)
    told = launcher_code in set(ExitCode) - {ExitCode.OK}
    return launcher_code if told else int(ExitCode.FAILED)


class _Stop:
    """Signals received, and handing them on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.asked = 0  # signals received
        self._forwarded = 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Count signals inside, but those that our caller has us ignore (nohup)."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked += 1

    def forward(self) -> None:
        if self.asked == self._forwarded:
            return
        self._forwarded = self.asked
        if self.asked == 1:
            print("launch: stopping after this step, with a checkpoint; once more kills", file=sys.stderr, flush=True)
            signal_ranks(self._process.pid, signal.SIGTERM)
        else:
            _kill_group(self._process.pid, signal.SIGKILL)


def signal_ranks(runner: int, number: signal.Signals) -> None:
    """Send `number` to the training processes alone: deepspeed's runner > its launch process > the ranks.

    Its launchers would kill what they started, and a rank's loader workers are its own affair. Before there are ranks
    there is nothing to save, and everything ends.
    """
    try:
        ranks = [rank for launcher in psutil.Process(runner).children() for rank in launcher.children()]
        for rank in ranks:
            rank.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it has just ended
    if not ranks:
        _kill_group(runner, signal.SIGKILL)


def _clear(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the command's session: by SIGTERM first, since a rank may still be saving."""
    if process.poll() is None:
        _kill_group(process.pid, signal.SIGKILL)
        process.wait()
    for number, seconds in ((signal.SIGTERM, _LEFT_BEHIND_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        if not _kill_group(process.pid, number):
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _alive(process.pid):
            time.sleep(_POLL_SECONDS)


def _kill_group(group: int, number: signal.Signals) -> bool:
    """Signal a process group; False if it is empty."""
    if not _alive(group):
        return False
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _alive(group: int) -> bool:
    """Whether a process of the group lives; zombies, which a lazy PID 1 leaves for ever, do not count."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (OSError, psutil.Error):
            continue
    return False
