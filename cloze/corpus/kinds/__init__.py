"""Kinds of tokenizers: every module here that holds a subclass of `base.Kind` is one, found by itself.

To add one: a file here; for a fast path of its own a file in data_prep/text; a test; a row in docs/data.md.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
