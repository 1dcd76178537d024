"""Who else is in the job, and what this machine tells of one that is gone: which rank, and whether memory ran out."""

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

VMSTAT = Path("/proc/vmstat")  # counts what the kernel has killed for want of memory, containers included
_OUT_OF_MEMORY = "the kernel has killed for want of memory: smaller micro-batches, or fewer data.workers"
_WAIT_SECONDS = 2.0  # a process closes its connections a moment before it is gone


class Peer(NamedTuple):
    """A rank's process, and where its number means it."""

    host: str
    namespace: int  # of process numbers
    pid: int


def this_process() -> Peer:
    return Peer(socket.gethostname(), Path("/proc/self/ns/pid").stat().st_ino, os.getpid())


def killed_for_memory() -> int:
    """Processes that this machine's kernel has killed for want of memory since it started; 0 where nothing tells."""
    with suppress(OSError):
        if found := re.search(r"(?m)^oom_kill (\d+)$", VMSTAT.read_text()):
            return int(found[1])
    return 0


def cause_of_kill(killed_before: int) -> str:
    """Why a process of this machine got SIGKILL, as far as the kernel tells: it had killed `killed_before` others."""
    if killed_for_memory() > killed_before:
        return _OUT_OF_MEMORY
    return (
        "perhaps for want of memory: the kernel's log (dmesg) tells, or that of who looks after the job (Slurm, "
        "Kubernetes, systemd-oomd)"
    )


class Peers:
    """The ranks as they met."""

    def __init__(self, ranks: list[Peer]) -> None:
        self._ranks, self._killed = ranks, killed_for_memory()

    def told(self) -> str:
        """What this machine tells of those that are gone, in brackets, or nothing."""
        here = this_process()
        mine = {rank: peer.pid for rank, peer in enumerate(self._ranks) if peer[:2] == here[:2]}
        end = time.monotonic() + _WAIT_SECONDS
        while not (gone := [rank for rank, pid in mine.items() if not _lives(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
        parts = [f"rank {rank} on this machine" for rank in gone]
        if killed_for_memory() > self._killed:
            parts.append(_OUT_OF_MEMORY)
        return f" ({'; '.join(parts)})" if parts else ""


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    return False
