"""The calls of a Slurm array, or of several machines, that share a directory and the work."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cloze.log import log
from data_prep.config import ArrayConfig
from data_prep.executors.base import Executor, Unfinished
from data_prep.executors.local import LocalExecutor
from data_prep.plan import PLAN, Plan
from data_prep.stages.base import Stage

_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0


class ArrayExecutor(Executor, kind="array"):
    """This call's share of every stage, in processes of its own; the other calls do theirs on the same directory.

    The share is every `num_tasks`-th task. Call 0 leads. Between stages a call waits for the others' results.
    """

    def __init__(self, plan: Plan) -> None:
        config = plan.config.executor
        assert isinstance(config, ArrayConfig)
        assert config.task_index is not None
        assert config.num_tasks is not None
        self._plan, self._index, self._calls = plan, config.task_index, config.num_tasks
        self._patience_seconds = config.wait_seconds
        self._local = LocalExecutor(plan)
        self.leads = self._index == 0

    def close(self, failed: bool) -> None:
        self._local.close(failed)

    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run this call's share, then wait for the rest; yield each number when it is done."""
        wanted = list(numbers)
        yield from self._local.run(stage, [number for number in wanted if number % self._calls == self._index])
        others = [number for number in wanted if number % self._calls != self._index]
        for done, number in enumerate(others):
            what = f"{stage.name}: {done} of {len(others)} tasks of the other {self._calls - 1} calls are done"
            self.wait_for(stage.result(self._plan, number), what)
            yield number

    def wait_for(self, path: Path, what: str = "") -> None:
        """Until `path` is there, or the leading call has finished the whole corpus; `what` is told every 10 s."""
        started = time.monotonic()
        end, told = started + self._patience_seconds, started
        while not path.exists() and (self._plan.work / PLAN).exists():
            now = time.monotonic()
            if now > told + _TELL_SECONDS:
                told = now
                log.info(
                    f"{what or f'waiting for {path.name} of call 0'}; waiting since {now - started:.0f} s, at most "
                    f"{self._patience_seconds:g} s"
                )
            if now > end:
                raise Unfinished(
                    f"{path}: not there after {self._patience_seconds:g} s; this call's share is done: run the "
                    "missing calls, or finish with executor=local"
                )
            time.sleep(_POLL_SECONDS)
