"""What an executor is: it runs the tasks of a stage in any order and any place, and says when each is done.

What a task does is none of its business.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from cloze.errors import ExitCode, UserError
from data_prep.plan import Plan
from data_prep.stages.base import Stage


class WorkerDied(UserError):
    """A worker process ended without a word: killed, out of memory, or our own bug, whose traceback it printed."""

    exit_code = ExitCode.FAILED


class Unfinished(UserError):
    """This call has done its share; what others were to do is not there."""

    exit_code = ExitCode.STOPPED


class Executor(ABC):
    """`executor=<kind>` is the one in the module `data_prep.executors.<kind>`; its values are the YAML of that name."""

    kinds: ClassVar[dict[str, type["Executor"]]] = {}
    leads = True  # this call trains the tokenizer and writes the manifest

    def __init_subclass__(cls, kind: str) -> None:
        Executor.kinds[kind] = cls

    @abstractmethod
    def __init__(self, plan: Plan) -> None: ...

    def wait_for(self, path: Path) -> None:
        """Until the leading call has made `path`. Raises `Unfinished` where that takes too long."""
        assert self.leads, "another executor than the leading call's knows how long to wait"

    @abstractmethod
    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """No more tasks come."""


def executor_of(plan: Plan) -> Executor:
    """The executor that the configuration asks for. Its module alone is imported: workers need no other."""
    kind = plan.config.executor.kind
    import_module(f"data_prep.executors.{kind}")
    return Executor.kinds[kind](plan)
