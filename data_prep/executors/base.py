"""What an executor is: it runs the tasks of a stage in any order and any place, and says when each is done.

What a task does is none of its business.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from cloze.errors import ExitCode, UserError
from data_prep.stages.base import Stage


class WorkerDied(UserError):
    """A worker process ended without a word: killed, out of memory, or our own bug, whose traceback it printed."""

    exit_code = ExitCode.FAILED


class Unfinished(UserError):
    """This call has done its share; what others were to do is not there."""

    exit_code = ExitCode.STOPPED


class Executor(ABC):
    leads = True  # this call trains the tokenizer and writes the manifest

    def wait_for(self, path: Path) -> None:
        """Until the leading call has made `path`. Raises `Unfinished` where that takes too long."""
        assert self.leads, "another executor than the leading call's knows how long to wait"

    @abstractmethod
    def run(self, stage: Stage, numbers: Iterable[int]) -> Iterator[int]:
        """Run tasks of one stage; yield the number of each when it is done. Raises what a task raised."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """No more tasks come."""
