"""The process that workers are forked off. Imports next to nothing, so that it starts before all else."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker


def start_server() -> None:
    """Start it, if it does not run: it imports what workers need while we go on. It and they never hear Ctrl-C."""
    multiprocessing.set_forkserver_preload(["data_prep.prepare", "data_prep.executors.local"])
    resource_tracker.ensure_running()  # itself deaf; else the server would start it, and it unblocks the signal
    with interrupts_held():  # inherited
        forkserver.ensure_running()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C is heard only when this is over: what starts meanwhile is deaf to it, and is not left half started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
