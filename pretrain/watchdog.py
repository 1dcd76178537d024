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

from cloze.errors import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_POLL_SECONDS = 1.0


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP asks for an orderly end; the loop agrees on the step with the other ranks.

    So does the death of the launcher that set this rank, since nobody would be left to end the others, and of the
    `deepspeed` command that started that: it dies of a signal without a word to its ranks. A second signal changes
    nothing; SIGHUP, of a closed terminal, nothing where our caller ignores it (nohup). Must be made in the main thread,
    before the process group.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = psutil.Process().parent() if "RANK" in os.environ else None
        self._runner = _parent(self._launcher) if self._launcher and _is_deepspeed(self._launcher) else None
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
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
    cover every process group. Before the first `tick`, and after one that tells of a `slow` part, it waits for
    `slow_seconds` [as long as `seconds`]. 0 never acts.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, slow_seconds: float | None = None) -> None:
        self._seconds, self._slow_seconds = seconds, seconds if slow_seconds is None else slow_seconds
        self._folder, self._rank = folder, rank
        self._limit, self._last = self._slow_seconds, time.monotonic()
        self._done = threading.Event()
        if limits := [limit for limit in (self._seconds, self._slow_seconds) if limit]:
            pause = min(_POLL_SECONDS, *(limit / 4 for limit in limits))
            threading.Thread(target=self._watch, args=[pause], name="watchdog", daemon=True).start()

    def tick(self, *, slow: bool = False) -> None:
        """Progress was made."""
        self._last = time.monotonic()  # first: the thread may look in between
        self._limit = self._slow_seconds if slow else self._seconds

    def close(self) -> None:
        self._done.set()

    @property
    def closed(self) -> bool:
        return self._done.is_set()

    def _watch(self, pause: float) -> None:
        while not self._done.wait(pause):
            limit, idle = self._limit, time.monotonic() - self._last
            if limit and idle > limit:
                self.give_up(idle, limit)

    def give_up(self, idle_seconds: float, limit: float) -> None:
        """Tell where every thread is, and end the process."""
        path = self._folder / f"stacks-rank{self._rank}.txt"
        key = "seconds" if limit == self._seconds else "start_seconds"
        print(  # not by the log: a thread that hangs may hold its lock
            f"error: rank {self._rank}: no progress for {idle_seconds:.0f} s (watchdog.{key}={limit:g}); "
            f"the stacks of all threads are in {path}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # in its start a run may have none yet
            with path.open("a") as file:  # after those of earlier starts
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(ExitCode.STUCK)
