"""The process that workers are forked off. Imports next to nothing, so that it starts before all else."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker


def start_server() -> None:
    """Start it, if it does not run: it imports what workers need while we go on. It and they never hear Ctrl-C."""
    multiprocessing.set_forkserver_preload(["data_prep.prepare"])
    resource_tracker.ensure_running()  # itself deaf; else the server would start it, and it unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
