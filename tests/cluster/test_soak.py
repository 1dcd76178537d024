"""Random faults in two runs on two nodes each: they survive all, and their losses are those of undisturbed ones.

`CLOZE_SOAK_FAULTS` faults [6], half of them in each run, drawn from `CLOZE_SOAK_SEED`. Some of them meet a run while it
starts again. The runs know nothing of each other: with `-n 2` they go side by side.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import NODES, Cluster, Training, why_not
from tests.support import Trainer, read_metrics

FAULTS = int(os.environ.get("CLOZE_SOAK_FAULTS", "6"))
LIMIT_SECONDS = 200 + 60 * FAULTS
SETTINGS = (
    "steps=20000", "checkpoint.every=10", "checkpoint.keep_last=2", "watchdog.seconds=20", "watchdog.start_seconds=240",
)  # fmt: skip
LAUNCH = ("restarts=100", "lost_after=6")
KINDS = ("rank", "rank", "stop", "agent", "launcher", "connection", "link", "node")


def victims(cluster: Cluster, kind: str, node: int) -> list[psutil.Process]:
    """What a fault would hit. Of a link or a whole node, which is always the second, that it takes part in the run."""
    words = {"agent": "launch.agent", "launcher": "deepspeed.launcher.launch", "connection": "sshd"}
    if kind in words:
        return [process for process in cluster.processes(node) if words[kind] in " ".join(process.cmdline())][:1]
    return cluster.ranks(2 if kind in ("link", "node") else node)


def strike(cluster: Cluster, rng: random.Random) -> str:
    """One fault that hits something; returns its name."""
    struck: list[psutil.Process] = []
    while not struck:
        time.sleep(0.1)  # between two starts there is nothing to hit
        kind, node = rng.choice(KINDS), rng.choice(NODES)
        try:
            struck = victims(cluster, kind, node)
            if kind not in ("link", "node"):
                for process in struck:
                    process.send_signal(signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        except psutil.NoSuchProcess:
            struck = []  # it has just ended
    if kind not in ("link", "node"):
        return f"{kind} of node {node}"
    if kind == "link":
        cluster.link(2, "down")
    else:
        cluster.kill(2)
    threading.Timer(rng.uniform(2, 12), cluster.revive, [2]).start()
    return kind


def reached(run: Training) -> int:
    return max((line["step"] for line in read_metrics(run.run)), default=0)


@pytest.mark.timeout(LIMIT_SECONDS)
@pytest.mark.parametrize("half", [1, 2], ids=["first half", "second half"])
def test_random_faults(trainer: Trainer, corpus: Path, tmp_path: Path, half: int) -> None:
    if reason := why_not():
        pytest.skip(reason)
    seed = int(os.environ.get("CLOZE_SOAK_SEED", time.time_ns() % 2**32))
    print(f"\nCLOZE_SOAK_SEED={seed}")
    rng, faults = random.Random(f"{seed} {half}"), (FAULTS + half % 2) // 2
    cluster = Cluster(tmp_path)
    started = time.monotonic()
    try:
        run = Training(cluster, tmp_path / "soak", f"data.path={corpus}", *SETTINGS, *LAUNCH)
        restarts = -1
        for fault in range(1, faults + 1):
            starting, before, restarts = run.restarts > restarts, reached(run), run.restarts
            if starting and rng.random() < 0.5:
                run.wait_until(lambda: any(cluster.ranks(node) for node in NODES))
                time.sleep(rng.uniform(0, 6))
                where = "in a start"
            else:
                run.wait_for(before + rng.randint(5, 40), seconds=600)
                where = "training"
            name = strike(cluster, rng)
            print(f"{time.monotonic() - started:5.0f} s  step {reached(run):4}  fault {fault:2}, {where}: {name}")
            noticed = time.monotonic() + 15  # a short gap in the link may need no restart
            while run.restarts == restarts and time.monotonic() < noticed:
                time.sleep(0.2)
        run.wait_for(reached(run) + 20, seconds=600)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(120) == 75, run.output
        print(f"{time.monotonic() - started:5.0f} s  stopped at step {reached(run)} after {run.restarts} restarts")
        left = [process.cmdline() for node in NODES for process in cluster.processes(node)]
        assert left == []
        expected = trainer.run(f"data.path={corpus}", *SETTINGS, f"stop_at={reached(run)}", ranks=2, timeout=300)
        assert expected.codes == (75, 75), expected.stderrs
        losses = {line["step"]: line["train/loss"] for line in expected.metrics if "train/loss" in line}
        assert run.losses == pytest.approx(losses, rel=1e-4)
    finally:
        cluster.close()
