"""What can be read: every module here that holds a subclass of `base.Source` is a kind of source, found by itself.

To add one: a file here, `conf/source/<kind>.yaml` with its values, a test, and a paragraph in docs/data.md.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
