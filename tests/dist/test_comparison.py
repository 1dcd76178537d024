"""Faults that no device reports: three ranks find the one whose memory or arithmetic is wrong, two find that one is."""

import json
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.support import Trainer

FLIP = """
import os
import torch
from pretrain.engine.engine import Engine

real, steps = Engine.step, 0

def step(self, lr):
    global steps
    done = real(self, lr)
    steps += 1
    if steps == {after} and os.environ["RANK"] == "{rank}":
        name, weights = list(self.replicated().items())[{tensor}]
        weights.view(torch.int32).view(-1)[0] ^= 1 << {bit}
    return done

Engine.step = step
"""

WRONG = """
import os
import torch

if os.environ["RANK"] == "{rank}":
    real = torch.nn.LayerNorm.forward
    torch.nn.LayerNorm.forward = lambda self, states: real(self, states) * (1 + 1e-6)
"""

UNSTEADY = """
import os
from pretrain.engine.engine import Engine

real, calls = Engine.evaluate, 0

def evaluate(self, batch):
    global calls
    calls += 1
    mlm, nsp = real(self, batch)
    if {when}:
        mlm[0, 0] *= 1 + 1e-3 * calls
    return mlm, nsp

Engine.evaluate = evaluate
"""


def saved(run: Path) -> list[int]:
    found = checkpoint.list_checkpoints(run / "checkpoints")
    assert all(checkpoint.verify(path) == [] for path in found)
    return [checkpoint.step_of(path) for path in found]


@pytest.mark.parametrize(("stage", "after", "bit"), [(0, 2, 0), (1, 3, 30), (3, 3, 12)])
def test_a_bit_that_flips_in_one_ranks_weights(
    trainer: Trainer, corpus: Path, stage: int, after: int, bit: int
) -> None:
    """At stage 0 it stays; from 1 on it lies in a copy that each step makes anew, so it is found within that step."""
    result = trainer.run(
        f"data.path={corpus}", "global_batch_size=12", f"zero={stage}", "checkpoint.every=2", "checks.weights_every=4",
        ranks=3, before=FLIP.format(after=after, rank=1, tensor=-1 if stage else 5, bit=bit),
    )  # fmt: skip
    assert result.codes == (70, 70, 70), result.stderrs
    (line,) = result.errors
    assert f"step {2 if stage == 0 else 3}: rank 1 (" in line
    assert ") has not the weights that the others of its kind hold (first: " in line
    assert saved(result.run) == ([] if stage == 0 else [2]), "none is made of what is not sound"
    assert json.loads((result.run / "status.json").read_text())["exit_code"] == 70


def test_two_ranks_find_that_one_of_them_is_wrong(trainer: Trainer, corpus: Path) -> None:
    result = trainer.run(
        f"data.path={corpus}", "zero=0", "checks.weights_every=2", ranks=2,
        before=FLIP.format(after=3, rank=0, tensor=-1, bit=3),
    )  # fmt: skip
    assert result.codes == (70, 70), result.stderrs
    (line,) = result.errors
    assert "differ, and no majority tells which is right: one of them has not the weights" in line
    assert ".exp_avg_sq)" in line, "moments are compared, too"


@pytest.mark.parametrize(
    ("ranks", "fault", "step", "words"),
    [
        (3, WRONG.format(rank=2), 2, "rank 2 ("),
        (2, UNSTEADY.format(when="os.environ['RANK'] == '1' and calls == 2"), 4, "rank 1 ("),  # it differs from itself
    ],
)
def test_a_rank_that_computes_wrongly(
    trainer: Trainer, corpus: Path, ranks: int, fault: str, step: int, words: str
) -> None:
    result = trainer.run(
        f"data.path={corpus}", f"global_batch_size={4 * ranks}", "checks.arithmetic_every=2", ranks=ranks, before=fault
    )
    assert result.codes == (70,) * ranks, result.stderrs
    (line,) = result.errors
    assert f"step {step}: " in line
    assert words in line
    assert f"checkpoints after step {step - 2} may hold its errors" in line


def test_a_device_that_never_computes_the_same_is_told_and_left(trainer: Trainer, corpus: Path) -> None:
    anything = UNSTEADY.format(when="True").replace(
        "calls\n    return", "(calls + int(os.environ['RANK']) / 2)\n    return"
    )
    result = trainer.run(f"data.path={corpus}", "checks.arithmetic_every=1", ranks=2, before=anything)
    assert result.codes == (0, 0), result.stderrs
    assert result.stderr.count("computes the same twice with different results") == 1


@pytest.mark.parametrize("stage", [0, 3])
def test_comparing_changes_nothing(trainer: Trainer, corpus: Path, stage: int) -> None:
    """Not one bit of weights, moments and losses, with dropout: state and random numbers are not touched."""
    own = (f"data.path={corpus}", f"zero={stage}", "model.dropout=0.1", "model.attention_dropout=0.1")
    found = []
    for every in (0, 1):
        checks = (f"checks.weights_every={every}", f"checks.arithmetic_every={every}")
        result = trainer.run(*own, *checks, ranks=2)
        assert result.codes == (0, 0), result.stderrs
        final = checkpoint.path_of(result.run / "checkpoints", 6)
        files = [(final / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
        found.append((files, result.series("train/loss"), result.series("train/grad_norm")))
    assert found[0] == found[1]
