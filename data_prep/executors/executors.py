"""Where tasks run: processes of this machine, the calls of a Slurm array, a Ray cluster.

An engine runs tasks in any order and any place and says when each is done; what a task does is none of its business.
"""

import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloze.errors import ExitCode, UserError
from data_prep.config import EngineKind
from data_prep.executors.fork_server import start_server
from data_prep.plan import PLAN, Plan
from data_prep.stages import tasks
from data_prep.stages.tasks import Stage

_POLL_SECONDS = 0.2
_LARGEST_ARRAY = 2**24  # bytes, about: of a task
_UNKNOWN = 255  # exit code of a worker whose server was killed
_RETRIES = 20  # of a task whose worker or machine was lost


class WorkerDied(UserError):
    """A worker process ended without a word: killed, out of memory, or our own bug, whose traceback it printed."""

    exit_code = ExitCode.FAILED


class Unfinished(UserError):
    """This call has done its share; what others were to do is not there."""

    exit_code = ExitCode.STOPPED


class Engine(ABC):
    leads = True  # this call trains the tokenizer and writes the manifest

    def wait_for(self, path: Path) -> None:
        """Until the leading call has made `path`. Raises `Unfinished` where that takes too long."""
        assert self.leads, "another engine than the leading call's knows how long to wait"

    @abstractmethod
    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """No more tasks come."""


@contextmanager
def engine_for(plan: Plan) -> Iterator[Engine]:
    """The engine that the configuration asks for."""
    kinds: dict[EngineKind, Callable[[Plan], Engine]] = {
        EngineKind.array: ArrayEngine,
        EngineKind.ray: RayEngine,
        EngineKind.local: LocalEngine,
    }
    engine = kinds[plan.config.engine.kind](plan)
    try:
        yield engine
    except BaseException:
        engine.close(failed=True)
        raise
    engine.close(failed=False)


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class LocalEngine(Engine):
    """Processes with one task at a time each; a single worker is this process itself.

    They are forked off a server that has imported what they need and does nothing else: no thread, no lock and no state
    of this process is inherited.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._num_workers = plan.config.engine.workers or len(os.sched_getaffinity(0))
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("forkserver")
        if self._num_workers == 1:
            _become_worker()
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
                tasks.run_task(self._plan, stage, number)
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
        return WorkerDied(f"a worker process died in {stage} task {number} of a bug of ours: report what it printed")
    cause = f"killed by {signal.Signals(-exit_code).name}" if exit_code else "no one knows how"
    if exit_code == -signal.SIGKILL:
        cause += ": out of memory? lower engine.workers or bucket_mib"
    return WorkerDied(f"a worker process died in {stage} task {number} ({cause}); run the same command again to go on")


class ArrayEngine(Engine):
    """This call's share of every stage, in processes of its own; the other calls do theirs on the same directory.

    The share is every `num_tasks`-th task. Call 0 leads. Between stages a call waits for the others' results.
    """

    def __init__(self, plan: Plan) -> None:
        config = plan.config.engine
        assert config.task_index is not None
        assert config.num_tasks is not None
        self._plan, self._index, self._calls = plan, config.task_index, config.num_tasks
        self._patience_seconds = config.wait_seconds
        self._local = LocalEngine(plan)
        self.leads = self._index == 0

    def close(self, failed: bool) -> None:
        self._local.close(failed)

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run this call's share, then wait for the rest; yield each number when it is done."""
        wanted = list(numbers)
        yield from self._local.run(stage, [number for number in wanted if number % self._calls == self._index])
        for number in wanted:
            if number % self._calls != self._index:
                self.wait_for(tasks.result_path(self._plan, stage, number))
                yield number

    def wait_for(self, path: Path) -> None:
        """Until `path` is there, or the leading call has finished the whole corpus."""
        end = time.monotonic() + self._patience_seconds
        while not path.exists() and (self._plan.work / PLAN).exists():
            if time.monotonic() > end:
                raise Unfinished(
                    f"{path}: not there after {self._patience_seconds:g} s; this call's share is done: run the "
                    "missing calls, or finish with engine=local"
                )
            time.sleep(_POLL_SECONDS)


class RayEngine(Engine):
    """Tasks of a Ray cluster, one per CPU; `out` lies where all its machines see it. Ray runs a lost task again."""

    def __init__(self, plan: Plan) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("engine=ray: needs Ray: pip install 'cloze[ray]'") from None
        self._ray, self._plan = ray, plan
        config = plan.config.engine
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        try:
            try:
                ray.init(config.address or "auto", **options)
            except ConnectionError:
                if config.address or os.environ.get("RAY_ADDRESS"):
                    raise
                ray.init("local", num_cpus=config.workers, **options)  # there is no cluster here
        except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"engine=ray: {first}; start the cluster (`ray start --head`) or correct engine.address"
            ) from error

    def close(self, failed: bool) -> None:
        self._ray.shutdown()

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""
        remote = self._ray.remote(max_retries=_RETRIES)(_ray_task)
        plan = self._ray.put(self._plan)
        waiting = deque(numbers)
        running: dict[Any, int] = {}
        while waiting or running:
            slots = self._plan.config.engine.workers or int(self._ray.cluster_resources().get("CPU", 1))
            while waiting and len(running) < slots:
                number = waiting.popleft()
                running[remote.remote(plan, stage, number)] = number
            done, _ = self._ray.wait(list(running))
            for reference in done:
                number = running.pop(reference)
                try:
                    error = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError:
                    raise  # our own bug, with its traceback
                except self._ray.exceptions.RayError as lost:
                    first = (str(lost).splitlines() or [type(lost).__name__])[0]
                    raise WorkerDied(
                        f"{stage} task {number}: lost again and again ({first}); run the same command again to go on"
                    ) from lost
                if error is not None:
                    raise error
                yield number


def _ray_task(plan: Plan, stage: Stage, number: int) -> UserError | None:
    _become_worker()
    try:
        tasks.run_task(plan, stage, number)
    except UserError as error:
        return error
    return None


def _become_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["USE_TORCH"] = "0"  # `datasets` would look for it


def _work(plan: Plan, connection: Connection) -> None:
    """A worker's life: receive a task, do it, answer None or the user's error."""
    _become_worker()
    np.empty(_LARGEST_ARRAY, np.uint8)  # freed: from then on malloc keeps what tasks free, else it pages it in anew
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


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
