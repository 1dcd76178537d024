"""Preparation: raw text -> a corpus of shards. `from data_prep import main; main(["source=text", "out=shards/x", …])`.

`sources` read documents, `text` cleans and encodes them, `stages` turn them into samples, `executors` run the stages'
tasks. Stands on `cloze` alone; never imports torch.
"""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from data_prep.__main__ import main

__all__ = ["main"]
__getattr__ = exports(__name__, {"main": "data_prep.__main__"})
