"""Where tasks run: here, a pool of processes on this machine.

An engine runs tasks in any order and any place and says when each is done; what a task does is none of its business.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType, TracebackType
from typing import NamedTuple, Protocol

from data_prep import tasks
from data_prep.errors import ExitCode, UserError
from data_prep.plan import Plan
from data_prep.tasks import Stage


class Engine(AbstractContextManager["Engine"], Protocol):
    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""
        ...


class WorkerDied(UserError):
    """A worker process ended without a word: killed, out of memory, or our own bug, whose traceback it printed."""

    exit_code = ExitCode.FAILED


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class LocalEngine(AbstractContextManager["LocalEngine"]):
    """One process per worker, started afresh (`spawn`: no state is inherited), each with one task at a time."""

    def __init__(self, plan: Plan, workers: int | None) -> None:
        self._plan = plan
        self._num_workers = workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle worker then ends by itself
            if kind is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""
        waiting = deque(numbers)
        self._start(len(waiting))
        idle = list(self._workers)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, number = idle.pop(), waiting.popleft()
                self._send(worker, stage, number)
                busy[worker.connection] = (worker, number)
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                worker, number = busy.pop(connection)
                self._receive(worker, stage, number)
                idle.append(worker)
                yield number

    def _start(self, tasks_waiting: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < min(self._num_workers, tasks_waiting):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(self._plan, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _send(self, worker: _Worker, stage: Stage, number: int) -> None:
        try:
            worker.connection.send((stage, number))
        except OSError:
            raise _death(worker, stage, number) from None

    def _receive(self, worker: _Worker, stage: Stage, number: int) -> None:
        try:
            error: UserError | None = worker.connection.recv()
        except (EOFError, OSError):
            raise _death(worker, stage, number) from None
        if error is not None:
            raise error


def _death(worker: _Worker, stage: Stage, number: int) -> WorkerDied:
    worker.process.join()
    exit_code = worker.process.exitcode
    cause = f"exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        cause = f"killed by {signal.Signals(-exit_code).name}"
        if exit_code == -signal.SIGKILL:
            cause += ": out of memory? lower engine.workers or bucket_mib"
    return WorkerDied(f"a worker process died in {stage} task {number} ({cause}); run the same command again to go on")


def _work(plan: Plan, connection: Connection) -> None:
    """A worker's life: receive a task, do it, answer None or the user's error."""
    sys.meta_path.insert(0, _WithoutTorch())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears Ctrl-C and ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            stage, number = connection.recv()
        except EOFError:
            return
        try:
            tasks.run_task(plan, stage, number)
        except UserError as error:
            connection.send(error)
        else:
            connection.send(None)


class _WithoutTorch(MetaPathFinder):
    """Makes `import torch` fail: webdataset would import it, which costs a second and much memory, for nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"{fullname} is kept out of preparation workers", name=fullname)
        return None


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
