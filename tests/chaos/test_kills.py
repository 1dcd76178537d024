"""SIGKILL at random moments, saves included, again and again: not one wrong batch, not one wrong bit.

Each stage trains once undisturbed on two ranks. Then the same run is started over and over; after a random time a
random rank, or both, is killed with SIGKILL, and the same command runs again. When a run gets to its end, its losses,
its count of samples and its final weights must be those of the undisturbed run, bit for bit.

Launchers are killed too: after that no process may be left, and the run goes on to the same end.
"""

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.support import ROOT, TINY, Result, Trainer, environment, free_port, read_metrics

STEPS, LAUNCHED_STEPS = 150, 60
KILLS_PER_STAGE = 12
SETTINGS = ("checkpoint.every=2", "checkpoint.keep_last=2", "model.dropout=0.1", "eval.every=40")


def evidence(result: Result, steps: int) -> dict[str, object]:
    """What may not differ: every step's samples and metrics (not time, not memory), the final weights and moments."""
    final = result.run / "checkpoints" / f"step-{steps:08d}"
    of_the_machine = ("time", "throughput/", "data/", "memory/")
    return {
        "lines": [{k: v for k, v in line.items() if not k.startswith(of_the_machine)} for line in result.metrics],
        "model": (final / "model.safetensors").read_bytes(),
        "optimizer": (final / "optimizer.safetensors").read_bytes(),
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_killed_runs_end_like_undisturbed_ones(zero: int, trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    rng = random.Random(zero)
    command = (f"data.path={corpus}", f"zero={zero}", f"steps={STEPS}", *SETTINGS)
    undisturbed = trainer.run(*command, ranks=2, timeout=200)
    assert undisturbed.codes == (0, 0), undisturbed.stderr
    expected = evidence(undisturbed, STEPS)
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
        assert evidence(result, STEPS) == expected
    print(f"\nZeRO {zero}: {dict(seen)}; wrong batches: 0")


DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2")
LAUNCHERS = {
    "deepspeed": lambda: (*DEEPSPEED, f"--master_port={free_port()}", "pretrain/train.py"),
    "launch.py": lambda: (*DEEPSPEED, f"--master_port={free_port()}", "pretrain/train.py"),
    "python -m launch": lambda: (sys.executable, "-m", "launch", "procs=2"),
}


def alive(mark: str) -> list[psutil.Process]:
    """Processes that inherited this environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("CHAOS") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.timeout(900)
def test_killed_launchers_leave_nothing_behind(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Without deepspeed's runner, launch.py ends the run; without that, or without our launch, ranks end themselves."""
    rng = random.Random(5)
    command = (f"data.path={corpus}", "zero=1", f"steps={LAUNCHED_STEPS}", *SETTINGS)
    expected = evidence(trainer.run(*command, ranks=2, timeout=200), LAUNCHED_STEPS)
    steps: dict[str, float] = {}
    for victim, launcher in LAUNCHERS.items():
        mark, place = uuid4().hex, (f"runs_root={tmp_path}", f"run={victim}")
        env = environment() | {"CHAOS": mark, "DS_ACCELERATOR": "cpu"}
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                [*launcher(), *TINY, *place, *command], cwd=ROOT, env=env, stdout=output, stderr=output
            )
        end, last = time.monotonic() + 300, rng.randrange(5, 30)
        while not any(line["step"] >= last for line in read_metrics(tmp_path / victim)):
            running = process.poll() is None and time.monotonic() < end
            assert running, (tmp_path / "output").read_text()
            time.sleep(0.02)
        children = psutil.Process(process.pid).children()
        (children[0] if victim == "launch.py" else process).send_signal(signal.SIGKILL)
        process.wait(60)
        end = time.monotonic() + 100
        while left := alive(mark):
            assert time.monotonic() < end, (victim, left, (tmp_path / "output").read_text())
            time.sleep(0.1)
        steps[victim] = read_metrics(tmp_path / victim)[-1]["step"]
        result = trainer.run(*command, *place, ranks=2, timeout=200)
        assert result.codes == (0, 0), result.stderr
        assert evidence(result, LAUNCHED_STEPS) == expected
    print(f"\nkilled launchers, and the step at which the ranks ended: {steps}; left behind: 0; wrong batches: 0")
