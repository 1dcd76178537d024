"""A stage of a preparation as tasks: pure functions of (plan, number), whose results appear whole or not at all.

Who runs a task, when, and how often, changes nothing: a result is written under a temporary name and renamed, so
killing and running again is always safe. To add a stage: a file beside this with a `Stage`, and its place in
prepare.py.

Knows nothing of processes, progress or Hydra.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloze.errors import DiskError, UserError
from cloze.storage import put
from data_prep.plan import PLAN, Plan, finished_manifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST)


@dataclass(frozen=True)
class Stage:
    """The functions are module-level ones: a stage travels to workers by name."""

    name: str
    num_tasks: Callable[[Plan], int]
    run: Callable[[Plan, int, Path], None]  # does task `number` and writes its result to the path

    def result(self, plan: Plan, number: int) -> Path:
        """What is there when, and only when, the task is done."""
        return plan.work / self.name / f"{number:06d}"

    def results(self, plan: Plan) -> list[Path]:
        """Those of all tasks, in order."""
        return [self.result(plan, number) for number in range(self.num_tasks(plan))]

    def run_task(self, plan: Plan, number: int) -> None:
        """Do one task. Raises `UserError` for bad input, `DiskError` for a full disk."""
        with disk_errors(plan), committed(plan, self.result(plan, number)) as path:
            self.run(plan, number, path)


@contextmanager
def disk_errors(plan: Plan) -> Iterator[None]:
    """Tell a full disk, and a place where nothing can be written, from our own bugs.

    Where two calls do the same work, one may finish the corpus, and clear up, under the other's feet: no harm.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(f"out={plan.out}: {error.strerror}; make room and run the same command again") from error
        gone = isinstance(error, FileNotFoundError) and not (plan.work / PLAN).exists()
        if gone and finished_manifest(plan) is not None:
            return
        if gone or error.errno in _UNUSABLE:
            raise UserError(f"out={plan.out}: {error.strerror}: {error.filename}; name another directory") from error
        raise


@contextmanager
def committed(plan: Plan, path: Path) -> Iterator[Path]:
    """A temporary file to write; when the block ends well it is synced and becomes `path`, else it is removed.

    What belongs to a corpus whose `out` is a URL is uploaded instead of renamed.
    """
    temporary = temporary_path(plan, f"{path.parent.name}-{path.name}")
    path.parent.mkdir(exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        inside = path.is_relative_to(plan.work)
        put(temporary, str(path) if inside else f"{plan.home}/{path.relative_to(plan.out).as_posix()}")
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(plan: Plan, name: str) -> Path:
    """A place that is no other process's."""
    folder = plan.work / "tmp"
    folder.mkdir(exist_ok=True)
    return folder / f"{os.uname().nodename}-{os.getpid()}-{name}"
