"""How texts are cut into words that are encoded apart: a module here that holds a subclass of `base.Cutter` is a way.

To add one: a file here, and a row of tests/unit/test_kinds.py. A tokenizer that none suits is encoded by `tokenizers`.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
