"""Entry: `deepspeed pretrain/train.py …`, `deepspeed --module pretrain.train …` or `python -m pretrain.train …`.

Hydra gives a typed configuration, process.py trains with it. What trains is imported when it is about to: `--help`, and
a mistake in the command line, do not wait for torch.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __package__ in (None, ""):  # started as a file: its own folder is on sys.path where the repository should be
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cloze import cli
from cloze.patience import telling
from pretrain.config import TrainConfig
from pretrain.launchers import adopt


def tell_sweep(configs: Sequence[TrainConfig]) -> None:
    from pretrain.sweep import tell

    tell(configs)


@cli.hydra_command("train", TrainConfig, launched=adopt, after_sweep=tell_sweep)
def main(config: TrainConfig) -> int:
    """One process of a run. Returns the exit code."""
    with telling("starting") if os.environ.get("RANK", "0") == "0" else nullcontext():  # torch and DeepSpeed
        from pretrain.process import train
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
