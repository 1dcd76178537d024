"""Processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np

from cloze.errors import UserError
from data_prep.executors.base import Executor, WorkerDied
from data_prep.executors.fork_server import interrupts_held, start_server
from data_prep.plan import Plan
from data_prep.stages.base import Stage

_LARGEST_ARRAY = 2**24  # bytes, about: of a task
_UNKNOWN = 255  # exit code of a worker whose server was killed


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class LocalExecutor(Executor, kind="local"):
    """Processes with one task at a time each; a single worker is this process itself.

    They are forked off a server that has imported what they need and does nothing else: no thread, no lock and no state
    of this process is inherited.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._num_workers = plan.config.executor.workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("forkserver")
        if self._num_workers == 1:
            become_worker()
        else:
            start_server()

    def close(self, failed: bool) -> None:
        for worker in self._workers:
            worker.connection.close()  # an idle worker then ends by itself
            if failed:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""
        waiting = deque(numbers)
        if self._num_workers == 1:
            for number in waiting:
                stage.run_task(self._plan, number)
                yield number
            return
        self._start(len(waiting))
        idle = list(self._workers)
        busy: dict[Connection, tuple[_Worker, int]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, number = idle.pop(), waiting.popleft()
                try:
                    worker.connection.send((stage, number))
                except OSError:
                    raise _death(worker, stage, number) from None
                busy[worker.connection] = (worker, number)
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                worker, number = busy.pop(connection)
                try:
                    error: UserError | None = connection.recv()
                except (EOFError, OSError):
                    raise _death(worker, stage, number) from None
                if error is not None:
                    raise error
                idle.append(worker)
                yield number

    def _start(self, tasks_waiting: int) -> None:
        while len(self._workers) < min(self._num_workers, tasks_waiting):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(self._plan, theirs), daemon=True)
            try:
                with interrupts_held():  # else a worker may wait in vain for the rest of what it is to do
                    process.start()
            except (EOFError, OSError):
                raise WorkerDied(
                    "the process that starts the workers died (killed, or out of memory?); run the same command again "
                    "to go on"
                ) from None
            theirs.close()
            self._workers.append(_Worker(process, ours))


def _death(worker: _Worker, stage: Stage, number: int) -> WorkerDied:
    worker.process.join()
    exit_code = worker.process.exitcode or 0
    if exit_code == _UNKNOWN:
        exit_code = 0
    if exit_code > 0:
        return WorkerDied(
            f"a worker process died in {stage.name} task {number} of a bug of ours: report what it printed"
        )
    cause = f"killed by {signal.Signals(-exit_code).name}" if exit_code else "no one knows how"
    if exit_code == -signal.SIGKILL:
        cause += ": out of memory? lower executor.workers or bucket_mib"
    return WorkerDied(
        f"a worker process died in {stage.name} task {number} ({cause}); run the same command again to go on"
    )


def become_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["USE_TORCH"] = "0"  # `datasets` would look for it


def _work(plan: Plan, connection: Connection) -> None:
    """A worker's life: receive a task, do it, answer None or the user's error."""
    become_worker()
    np.empty(_LARGEST_ARRAY, np.uint8)  # freed: from then on malloc keeps what tasks free, else it pages it in anew
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            stage, number = connection.recv()
        except (EOFError, ConnectionError):  # the parent is gone; a reset, where it had not read the last answer
            return
        answer: UserError | None = None
        try:
            stage.run_task(plan, number)
        except UserError as error:
            answer = error
        with suppress(ConnectionError):
            connection.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
