"""The mean of the weights of a run's newest checkpoints: latest weight averaging.

Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging": in the
middle of a schedule the uniform mean of the last few checkpoints is as good as a later one. It needs no state of its
own: a run neither knows of it nor changes by it. Layer normalization keeps no statistics, so the mean is a whole model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cloze.errors import UserError
from pretrain.checkpoint.format import list_checkpoints, load, step_of, verify


def latest(newest: Path, count: int, report: Callable[[str], None]) -> list[Path]:
    """`count` sound checkpoints up to `newest`, which is one of them, oldest first.

    `report` is told of each that is passed over. Raises `UserError` where there are fewer.
    """
    if count < 1:
        raise UserError(f"--average {count}: must be at least 1")
    found = [newest]
    for path in reversed(list_checkpoints(newest.parent)):
        if len(found) == count:
            break
        if step_of(path) < step_of(newest):
            if faults := verify(path):
                report(f"checkpoint {path} is damaged ({faults[0]}); taking the one before it")
            else:
                found.append(path)
    if len(found) < count:
        raise UserError(
            f"--average {count}: {newest.parent} holds {len(found)} sound up to step {step_of(newest)}; set --average "
            f"{len(found)}, or keep more in training: checkpoint.keep_last={count}"
        )
    return found[::-1]


def mean_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """By name, in fp32; added in fp64, one checkpoint in memory at a time. Raises `UserError` as `load` does, and where
    they are of different models.
    """
    sums: dict[str, Tensor] = {}
    for path in paths:
        weights = load(path).weights
        shapes = {name: value.shape for name, value in weights.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise UserError(f"{path}: is of another model than {paths[0]}; average fewer checkpoints")
        for name, value in weights.items():
            sums[name] = sums[name] + value if name in sums else value.to(torch.float64)
    return {name: (value / len(paths)).to(torch.float32) for name, value in sums.items()}
