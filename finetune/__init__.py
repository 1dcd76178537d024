"""Fine-tuning and looking: a pretrained model -> a task's model and its scores.

`from finetune import main; main(["task=sst2", "model=out/books", "out=out/sst2"])`, or `finetune(config)`, which
returns the scores. `families` hold what tasks of a kind share. Stands on `pretrain` and `cloze`.
"""

from typing import TYPE_CHECKING

from cloze.lazy import exports

if TYPE_CHECKING:
    from finetune.__main__ import finetune, main

__all__ = ["finetune", "main"]
__getattr__ = exports(__name__, dict.fromkeys(__all__, "finetune.__main__"))
