"""Knowing when to stop: a request by signal, and a step that never ends."""

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from data_prep.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 1.0


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 asks for an orderly end; the loop agrees on the step with the other ranks.

    So does the death of the launcher that set this rank, since nobody would be left to end the others, and of the
    `deepspeed` command that started that: it dies of a signal without a word to its ranks. A second signal changes
    nothing. Must be made in the main thread, before the process group.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = psutil.Process().parent() if "RANK" in os.environ else None
        self._runner = _parent(self._launcher) if self._launcher and _is_deepspeed(self._launcher) else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signalled = True

    @property
    def requested(self) -> bool:
        if self._signalled or self._launcher is None:
            return self._signalled
        return os.getppid() != self._launcher.pid or (
            self._runner is not None and _parent(self._launcher) != self._runner
        )


def _is_deepspeed(process: psutil.Process) -> bool:
    """Whether it is deepspeed's launcher of a node's ranks, which has a parent that matters."""
    with suppress(psutil.Error):
        return any("deepspeed" in word and "launcher" in word for word in process.cmdline())
    return False


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return int(process.ppid())
    return None


class Watchdog:
    """Exits 71 with every thread's stack on stderr and in `folder` when nothing called `tick` for `seconds`.

    A thread of its own: the main one may hang in a collective whose peer is dead, and DeepSpeed's time-outs do not
    cover every process group. `seconds` = 0 never acts.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self._seconds, self._folder, self._rank = seconds, folder, rank
        self._last = time.monotonic()
        self._done = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def tick(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(_POLL_SECONDS, self._seconds / 4)):
            idle = time.monotonic() - self._last
            if idle > self._seconds:
                self._give_up(idle)

    def _give_up(self, idle_seconds: float) -> None:
        path = self._folder / f"stacks-rank{self._rank}.txt"
        print(
            f"error: rank {self._rank}: no progress for {idle_seconds:.0f} s (watchdog.seconds={self._seconds:g}); "
            f"the stacks of all threads are in {path}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(ExitCode.STUCK)
