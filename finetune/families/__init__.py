"""The families of tasks. Each module here is one, and has its `TASKS`: a new family is a new file."""

import pkgutil
from collections.abc import Mapping, Sequence
from importlib import import_module

from finetune.tasks import Task


def _found() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__):
        own: Mapping[str, Task] = import_module(f"{__name__}.{module.name}").TASKS
        assert not own.keys() & found.keys(), f"{module.name}: names a task that another family has"
        found |= own
    return found


TASKS: Mapping[str, Task] = _found()
SUITES: Mapping[str, Sequence[str]] = {
    suite: tuple(name for name, task in TASKS.items() if task.suite == suite)
    for suite in dict.fromkeys(task.suite for task in TASKS.values() if task.suite)
}
