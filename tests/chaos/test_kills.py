"""SIGKILL at random moments, saves included, again and again: not one wrong batch, not one wrong bit.

Each stage trains once undisturbed on two ranks, with loader processes. Then the same run is started over and over: a
random rank, or both at once, is killed while it starts, while it trains, or inside a save, and the same command runs
again. When a run gets to its end, what every rank trained on at every step of all its starts (faults.py writes it
down), its metrics, and its final weights and moments must be those of the undisturbed run, bit for bit.

Launchers, and whole groups of processes, are killed under `deepspeed` and `python -m launch`, too. After every kill no
process may be left.
"""

import json
import os
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

from tests.support import ROOT, TINY, Job, Trainer, environment, free_port, later_wins, read_metrics

STEPS, LAUNCHED_STEPS = 150, 75  # 8 and 4 epochs
KILLS_PER_STAGE = {"in a save": 5, "of a rank": 4, "of the group": 3}
LAUNCHED_KILLS = 6  # so 54 in all
SAMPLES = 300  # of the corpus
SETTINGS = (
    "checkpoint.every=2", "checkpoint.keep_last=2", "model.dropout=0.1", "eval.every=40", "data.workers=1",
    "global_batch_size=16",
)  # fmt: skip


FAULTS = "import tests.chaos.faults"
SITE = (
    f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'chaos' / 'site'}"  # PYTHONPATH of launchers, whose ranks then import FAULTS
)


class Chaos:
    """Starts of one run: what its processes are told by their environment, and what they wrote down."""

    def __init__(self, log: Path) -> None:
        self.log, self.mark = log, uuid4().hex
        log.mkdir()

    def environment(self, kill: str = "") -> dict[str, str]:
        told = {"CHAOS_LOG": str(self.log), "CHAOS": self.mark}
        return told | ({"CHAOS_KILL": kill} if kill else {})

    def trained(self, ranks: int = 2) -> list[set[tuple[int, int, str]]]:
        """Of each rank (step, first position, samples), as often as it trained on it in all starts: once a line."""
        found = []
        for rank in range(ranks):
            lines = map(json.loads, (self.log / f"rank-{rank}.jsonl").read_text().splitlines())
            found.append({(line["step"], line["first"], " ".join(line["samples"])) for line in lines})
        return found

    def kills_inside_saves(self) -> int:
        path = self.log / "saves.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def nothing_left(self, seconds: float) -> None:
        """Wait until no process is alive that inherited the mark."""
        end = time.monotonic() + seconds
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            assert time.monotonic() < end, left
            time.sleep(0.05)

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get("CHAOS") == self.mark and process.status() != psutil.STATUS_ZOMBIE
        return False


def evidence(run: Path, chaos: Chaos, steps: int) -> dict[str, object]:
    """What may not differ: every step's samples and metrics (not time, not memory), the final weights and moments."""
    final = run / "checkpoints" / f"step-{steps:08d}"
    of_the_machine = ("time", "throughput/", "data/", "memory/")
    return {
        "trained": chaos.trained(),
        "lines": [{k: v for k, v in line.items() if not k.startswith(of_the_machine)} for line in read_metrics(run)],
        "model": (final / "model.safetensors").read_bytes(),
        "optimizer": (final / "optimizer.safetensors").read_bytes(),
    }


def undisturbed(trainer: Trainer, chaos: Chaos, command: tuple[str, ...], steps: int) -> dict[str, object]:
    """The evidence of a run without faults: every position once, every sample as often as there are epochs."""
    result = trainer.run(*command, ranks=2, env=chaos.environment(), before=FAULTS, timeout=200)
    assert result.codes == (0, 0), result.stderr
    ranks = chaos.trained()
    for trained in ranks:
        assert sorted((step, first) for step, first, _ in trained) == [(step, 16 * step) for step in range(steps)]
    counts = Counter(sample for trained in ranks for _, _, samples in trained for sample in samples.split())
    assert len(counts) == SAMPLES
    assert {*counts.values()} == {16 * steps // SAMPLES}
    return evidence(result.run, chaos, steps)


def strike(job: Job, rng: random.Random, victims: tuple[int, ...]) -> None:
    """SIGKILL to these ranks at a random moment of the steps, to all of them perhaps of the start.

    A rank that waits for others to start does not see one die: its launcher does.
    """
    steps = rng.choice([0, rng.randrange(1, 40)]) if len(victims) == 2 else rng.randrange(1, 40)
    known = max((line["step"] for line in read_metrics(job.run)), default=0)
    end = time.monotonic() + (120 if steps else rng.uniform(0.1, 3.0))
    while None in job.codes() and time.monotonic() < end:
        if steps and max((line["step"] for line in read_metrics(job.run)), default=0) >= known + steps:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.05))
    for rank in victims:
        with suppress(ProcessLookupError):
            job.signal(rank, signal.SIGKILL)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_killed_runs_end_like_undisturbed_ones(zero: int, trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    rng = random.Random(zero)
    command = (f"data.path={corpus}", f"zero={zero}", f"steps={STEPS}", *SETTINGS)
    expected = undisturbed(trainer, Chaos(tmp_path / "undisturbed"), command, STEPS)
    kills, seen = [kind for kind, count in KILLS_PER_STAGE.items() for _ in range(count)], Counter[str]()
    rng.shuffle(kills)
    while True:
        seen["runs"] += 1
        chaos, place = Chaos(tmp_path / f"log-{seen['runs']}"), (f"runs_root={tmp_path}", f"run={seen['runs']}")
        while True:
            seen["starts"] += 1
            kind = kills[-1] if kills else "none: to the end"
            rank = rng.randrange(2 if zero or kind != "in a save" else 1)  # at stage 0 rank 0 alone saves
            in_save = f"{rank}:{rng.randrange(1, 8 if rank else 40)}" if kind == "in a save" else ""
            job = trainer.start(*command, *place, ranks=2, env=chaos.environment(in_save), before=FAULTS)
            if kind in ("of a rank", "of the group"):
                strike(job, rng, (rank,) if kind == "of a rank" else (0, 1))
            result = job.wait(300)
            chaos.nothing_left(20)
            assert not any("Traceback" in text for text in result.stderrs), result.stderrs
            if -signal.SIGKILL not in result.codes:
                break
            seen[kills.pop()] += 1
            assert kind == "of the group" or 71 in result.codes or 0 in result.codes, (
                result.stderrs
            )  # it tells, and goes
        assert result.codes == (0, 0), result.stderrs
        assert evidence(result.run, chaos, STEPS) == expected
        seen["operations of saves cut"] += chaos.kills_inside_saves()
        if not kills:
            break
    assert seen["operations of saves cut"] == seen["in a save"] == KILLS_PER_STAGE["in a save"]
    print(f"\nZeRO {zero}: {dict(seen)}; wrong batches: 0")


DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2")


@pytest.mark.timeout(1200)
def test_killed_launchers_leave_nothing_behind(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Without deepspeed's runner or its launch.py, or our launch, the ranks end themselves."""
    rng = random.Random(5)
    command = (f"data.path={corpus}", "zero=1", f"steps={LAUNCHED_STEPS}", *SETTINGS)
    expected = undisturbed(trainer, Chaos(tmp_path / "undisturbed"), command, LAUNCHED_STEPS)
    chaos, place = Chaos(tmp_path / "log"), (f"runs_root={tmp_path}", "run=killed")
    ended_at: dict[str, int] = {}
    victims = ["deepspeed", "launch.py", "python -m launch", "group"]
    for victim in rng.sample([*victims, *rng.sample(victims, LAUNCHED_KILLS - len(victims))], LAUNCHED_KILLS):
        by_deepspeed = (*DEEPSPEED, f"--master_port={free_port()}", "pretrain/train.py")
        launcher = (sys.executable, "-m", "launch", "procs=2") if victim == "python -m launch" else by_deepspeed
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                [*launcher, *later_wins(*TINY, *place, *command)],
                cwd=ROOT,
                env=environment() | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": SITE} | chaos.environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        known = max((line["step"] for line in read_metrics(tmp_path / "killed")), default=0)
        end, at = time.monotonic() + 300, known + rng.randrange(1, 9)
        while not any(line["step"] >= at for line in read_metrics(tmp_path / "killed")):
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < end, (tmp_path / "output").read_text()
            time.sleep(0.02)
        struck = psutil.Process(process.pid)
        if victim == "group":
            for each in [struck, *struck.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        else:
            (struck.children()[0] if victim == "launch.py" else struck).kill()
        process.wait(60)
        chaos.nothing_left(100)
        ended_at[f"{len(ended_at) + 1}: {victim}"] = read_metrics(tmp_path / "killed")[-1]["step"]
    result = trainer.run(*command, *place, ranks=2, env=chaos.environment(), before=FAULTS, timeout=200)
    assert result.codes == (0, 0), result.stderr
    assert evidence(result.run, chaos, LAUNCHED_STEPS) == expected
    print(f"\nkilled launchers, and the step at which the ranks ended: {ended_at}; left behind: 0; wrong batches: 0")
