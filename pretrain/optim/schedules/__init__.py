"""The keys of `schedule`: those of every schedule in `base`, those of one in the module of its name, with its shape.

A schedule is one module here and its defaults in `conf/schedule`. Nothing lists them.
"""

import importlib
import pkgutil

from pretrain.optim.schedules.base import ScheduleConfig

__all__ = ["ScheduleConfig"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
