"""Fine-tuning under several ranks, one for each device, as `torchrun` starts them: for families whose loss spans them.

Every rank runs the same program. The Trainer deals the samples and averages gradients; rank 0 alone keeps what comes
of it. What the others write nobody sees, but for their part of a checkpoint.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from cloze.errors import UserError
from finetune.config import FinetuneConfig

OPTION = "ranks"  # of a family that can

T = TypeVar("T")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return world_size() == 1 or int(os.environ.get("RANK", "0")) == 0


def agreed(value: T) -> T:
    """That of rank 0, on every rank. A collective."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def all_have(has: bool) -> bool:
    """Whether every rank has it. A collective."""
    if world_size() == 1:
        return has
    each: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(each, has)
    return all(each)


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
    PartialState(cpu=not torch.cuda.is_available())  # the group that the Trainer will find
    try:
        if is_first():
            yield config
        else:
            with tempfile.TemporaryDirectory() as scratch:
                yield replace(config, out=f"{scratch}/out")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
