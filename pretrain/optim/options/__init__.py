"""The keys of `optim`: those of every optimizer in `base`, those of one in the module of its name.

An optimizer is two modules of one name: its keys here (no torch), its `build(config, groups)` in `pretrain.optim`; and
its defaults in `conf/optim`. Nothing lists them.
"""

import importlib
import pkgutil

from pretrain.optim.options.base import OptimConfig

__all__ = ["OptimConfig"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
