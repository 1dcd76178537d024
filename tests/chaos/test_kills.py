"""SIGKILL at random moments, saves included, again and again: not one wrong batch, not one wrong bit.

Each stage trains once undisturbed on two ranks. Then the same run is started over and over; after a random time a
random rank, or both, is killed with SIGKILL, and the same command runs again. When a run gets to its end, its losses,
its count of samples and its final weights must be those of the undisturbed run, bit for bit.
"""

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.support import Result, Trainer

STEPS = 150
KILLS_PER_STAGE = 13
SETTINGS = (f"steps={STEPS}", "checkpoint.every=2", "checkpoint.keep_last=2", "model.dropout=0.1", "eval.every=40")


def evidence(result: Result) -> dict[str, object]:
    """What may not differ: every step's samples and metrics (timings apart), and the final weights and moments."""
    final = result.run / "checkpoints" / f"step-{STEPS:08d}"
    timed = ("time", "throughput/", "data/")
    return {
        "lines": [{k: v for k, v in line.items() if not k.startswith(timed)} for line in result.metrics],
        "model": (final / "model.safetensors").read_bytes(),
        "optimizer": (final / "optimizer.safetensors").read_bytes(),
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_killed_runs_end_like_undisturbed_ones(zero: int, trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    rng = random.Random(zero)
    command = (f"data.path={corpus}", f"zero={zero}", *SETTINGS)
    undisturbed = trainer.run(*command, ranks=2, timeout=200)
    assert undisturbed.codes == (0, 0), undisturbed.stderr
    expected = evidence(undisturbed)
    assert undisturbed.series("samples") == [16 * (step + 1) for step in range(STEPS)]

    seen: Counter[str] = Counter()
    while seen["kills"] < KILLS_PER_STAGE:
        seen["runs"] += 1
        name = f"run={seen['runs']}"
        while True:
            job = trainer.start(*command, f"runs_root={tmp_path}", name, ranks=2)
            victims = rng.choice([(0,), (1,), (0, 1)])
            struck = job.strike(victims, signal.SIGKILL, after=rng.uniform(0.3, 6.0))
            seen["inside a save"] += struck and any((job.run / "checkpoints").glob(".writing-*"))
            result = job.wait(200)
            if not struck:
                break
            seen["kills"] += 1
            seen[f"victims {victims}"] += 1
        assert result.codes == (0, 0), result.stderr
        assert evidence(result) == expected
    print(f"\nZeRO {zero}: {dict(seen)}; wrong batches: 0")
