"""What launch runs on each node: starts the node's ranks, obeys launch's requests, leaves no process behind.

`python -m launch.agent JOB_ID` is a child of launch on this machine and of ssh on others. On stdin come a `Task` as one
line of JSON, then `heartbeat` now and then, `stop` (orderly, with a checkpoint), `end` (soon) or `kill` (at once). The
end of stdin, or no word for `lost_after` seconds, is `end`: a node that launch has lost must not train on. On stdout
goes one line of JSON first (`Handshake`), then what the ranks print.

The exit code is training's own where deepspeed's launcher knows it; for a launcher that was killed, the one that
training wrote down; else `CRASHED` or `ENDED`. Every process of the node has JOB_ID in its environment, by which
it is found whatever became of its parents; an agent first ends what an earlier one of the same job has left.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cloze import ownership
from cloze.errors import ExitCode, UserError, first_line
from cloze.log import log
from launch.command import Command, NodeStart, free_port, node_command, this_machine
from pretrain.machine import interface_of
from pretrain.peers import cause_of_kill, killed_for_memory

CRASHED = 1  # a rank was killed or raised: another start may help
ENDED = 2  # the ranks were ended as launch asked
STATUS_NAME = "status.json"
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL for ranks whose run is over

_JOB_VARIABLE = "CLOZE_LAUNCH"
_LOOK_SECONDS = 0.5  # between two looks at all processes, which cost some milliseconds
_POLL_SECONDS = 0.1
_LEFTOVERS_SECONDS = 2.0  # the same for what ranks that have ended left behind
_FINISH_SECONDS = 60.0  # for the other ranks of the node to end after the first one
_SIGTERMED = (-signal.SIGTERM, 256 - signal.SIGTERM)  # the launcher itself, or its rank whose code it passes on
_KILLED = 256 - signal.SIGKILL  # the same of a rank that got SIGKILL
_BY_SIGNAL = 128  # the launcher's codes above are of ranks that a signal ended


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What launch needs to know of a node before it can start."""

    port: int  # free there
    address: str | None = None  # by which ssh reached the node
    launch_address: str | None = None  # from which it was reached


@dataclass(frozen=True, kw_only=True)
class Task(NodeStart):
    """One node's part in one start of a run, as it travels from launch to the agent: as JSON."""

    run_dir: str | None  # where training writes status.json
    address: str | None = None  # this node's
    environment: dict[str, str] = field(default_factory=dict)
    lost_after: float = 0.0  # seconds; 0: never


class Requests:
    """What launch has requested so far, read by a thread."""

    def __init__(self, stream: io.RawIOBase, lost_after: float) -> None:
        self._stream = stream
        self._seen: set[str] = set()
        self._lost_after = lost_after
        self._heard = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            self._seen.add(line.decode().strip())
            self._heard = time.monotonic()
        self._seen.add("end")

    def requested(self, request: str) -> bool:
        if request == "end" and self._lost_after and time.monotonic() - self._heard > self._lost_after:
            return True
        return request in self._seen


def run(command: Command, status: Path | None, requested: Callable[[str], bool], job_id: str) -> int:
    """Run `command` until it ends or is requested to, and return the agent's exit code.

    `status` is the file in which rank 0, where it is on this node, writes how training ended.
    """
    if status and ownership.is_of(status.parent, ownership.RUN):  # else training refuses the directory
        status.unlink(missing_ok=True)
    killed_before = killed_for_memory()
    process = subprocess.Popen(
        command.arguments,
        env=command.full_environment() | {_JOB_VARIABLE: job_id},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    ranks = _Ranks(process.pid)
    forwarded = False
    try:
        while process.poll() is None and not requested("end") and not requested("kill") and not ranks.overdue():
            if requested("stop") and not forwarded:
                forwarded = True
                if not ranks.signal(signal.SIGTERM):  # nothing has started, nothing is to be saved
                    break
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
    finally:
        launcher_ended = process.poll() is not None and process.returncode >= 0  # and with it all ranks
        end_processes(job_id, requested, _LEFTOVERS_SECONDS if launcher_ended else GRACE_SECONDS)
    if launcher_ended and process.returncode == _KILLED:
        log.warning(f"{socket.gethostname()}: a rank was killed (SIGKILL; {cause_of_kill(killed_before)})")
    code = true_exit_code(status, process.wait(), stop_requested=forwarded and not requested("kill"))
    if requested("kill") and code == ExitCode.STUCK:  # the ranks died of us
        code = CRASHED
    return ENDED if code == CRASHED and requested("end") else code


def true_exit_code(status: Path | None, launcher_code: int, *, stop_requested: bool) -> int:
    """What the launcher says if that is a code of ours, else what training wrote down, else `CRASHED`.

    Training writes 70 for whatever it raises: only the launcher knows whether it was a failure that it foresaw. Where a
    rank was killed (`kill -9`, out of memory), the others write 71 and rank 0 itself writes nothing: both are 71. Ranks
    that our SIGTERM killed, since they had not begun, count as stopped: the same command goes on.
    """
    if launcher_code in set(ExitCode):
        return launcher_code
    try:
        written = int(json.loads(status.read_bytes())["exit_code"]) if status else None
    except FileNotFoundError:
        killed = launcher_code > _BY_SIGNAL and not stop_requested
        asked = stop_requested and launcher_code in _SIGTERMED
        written = ExitCode.STOPPED if asked else ExitCode.STUCK if killed else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(f"{status}: unreadable ({first_line(error)}); calling the run failed")
        written = None
    return written if written in (ExitCode.OK, ExitCode.STOPPED, ExitCode.STUCK) else CRASHED


class _Ranks:
    """The training processes of a node: the children of deepspeed's launcher."""

    def __init__(self, launcher: int) -> None:
        self._launcher = launcher
        self._most = 0
        self._first_gone: float | None = None

    def _alive(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            children = psutil.Process(self._launcher).children()
            return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return []

    def signal(self, number: signal.Signals) -> bool:
        """Signal them alone, all at once; False if there are none. The launcher would do it one by one, 30 s apart."""
        ranks = self._alive()
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(number)
        return bool(ranks)

    def overdue(self) -> bool:
        """Whether some have long ended and others have not: the launcher gives each 30 s, one after another."""
        alive = len(self._alive())
        self._most = max(self._most, alive)
        if alive == self._most:
            return False
        self._first_gone = self._first_gone or time.monotonic()
        return time.monotonic() - self._first_gone > _FINISH_SECONDS


def end_processes(
    job_id: str, requested: Callable[[str], bool] = lambda request: False, grace: float = GRACE_SECONDS
) -> None:
    """End every process of the job: by SIGTERM first, since a rank may still be saving."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace
        left = _processes_of(job_id)
        for process in left if number == signal.SIGKILL or not requested("kill") else ():
            with suppress(psutil.Error):
                process.send_signal(number)
        while left and time.monotonic() < deadline and not (number == signal.SIGTERM and requested("kill")):
            time.sleep(_POLL_SECONDS)
            left = _processes_of(job_id)
        if not left:
            return


def _processes_of(job_id: str) -> list[psutil.Process]:
    """Processes of this job; zombies, which a lazy PID 1 leaves for ever, do not count."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_JOB_VARIABLE) == job_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def perform(task: Task, job_id: str, requested: Callable[[str], bool]) -> int:
    """Run this node's part of `task`. Raises `UserError` where the node cannot."""
    os.environ.update(task.environment)
    if task.address and "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_of(task.address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    status = Path(task.run_dir) / STATUS_NAME if task.run_dir and task.node_rank == 0 else None  # rank 0 writes it
    return run(node_command(task, this_machine()), status, requested, job_id)


def handshake(environment: Mapping[str, str]) -> Handshake:
    connection = environment.get("SSH_CONNECTION", "").split()  # client's address and port, server's address and port
    if len(connection) != 4:
        return Handshake(port=free_port())
    return Handshake(port=free_port(), address=connection[2], launch_address=connection[0])


def main(job_id: str) -> int:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # launch tells what to do; what is ignored would be so in the ranks too
    end_processes(job_id)
    print(json.dumps(asdict(handshake(os.environ))), flush=True)
    stream = io.FileIO(0, closefd=False)  # unbuffered: a thread may read it while the interpreter ends
    line = stream.readline()
    if not line:  # launch only wanted what was left here ended
        return ExitCode.OK
    received: dict[str, Any] = json.loads(line)
    task = Task(**received)
    try:
        return perform(task, job_id, Requests(stream, task.lost_after).requested)
    except UserError as error:
        log.error(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
