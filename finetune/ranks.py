"""Fine-tuning under several ranks, one for each device, as `torchrun` starts them: for families whose loss spans them.

Every rank runs the same program. The Trainer deals the samples and averages gradients; rank 0 alone keeps what comes
of it, the others write into folders that nobody sees.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed

from cloze.errors import UserError
from finetune.config import FinetuneConfig

OPTION = "ranks"  # of a family that can


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def as_rank(config: FinetuneConfig) -> Iterator[FinetuneConfig]:
    """The configuration that this rank runs with. Raises `UserError` where several ranks cannot learn the task."""
    if world_size() == 1:
        yield config
        return
    if OPTION not in config.definition.family.options:
        raise UserError("fine-tuning is one process that uses every GPU it sees: start it by `python -m finetune`")
    if config.num_seeds > 1:
        raise UserError(f"num_seeds={config.num_seeds}: several ranks learn one seed; start a run for each")
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            yield config
        else:
            with tempfile.TemporaryDirectory() as scratch:
                yield replace(config, out=f"{scratch}/out")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
