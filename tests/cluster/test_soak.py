"""Twenty random faults in one run on two nodes: it survives each, and ends with the losses of an undisturbed one."""

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

FAULTS = 20
STEPS = 1500
SETTINGS = (f"steps={STEPS}", "checkpoint.every=10", "checkpoint.keep_last=2", "watchdog.seconds=10")
LAUNCH = ("restarts=100", "lost_after=6")


def named(cluster: Cluster, node: int, word: str) -> list[psutil.Process]:
    return [process for process in cluster.processes(node) if word in " ".join(process.cmdline())]


def strike(cluster: Cluster, rng: random.Random) -> str:
    """One fault; returns its name."""
    node = rng.choice(NODES)
    kind = rng.choice(("rank", "rank", "stop", "agent", "launcher", "connection", "link", "node"))
    if kind == "rank":
        victims, number = cluster.ranks(node), signal.SIGKILL
    elif kind == "stop":
        victims, number = cluster.ranks(node), signal.SIGSTOP
    elif kind == "agent":
        victims, number = named(cluster, node, "launch.agent")[:1], signal.SIGKILL
    elif kind == "launcher":
        victims, number = named(cluster, node, "deepspeed.launcher.launch")[:1], signal.SIGKILL
    elif kind == "connection":
        victims, number = named(cluster, node, "sshd")[:1], signal.SIGKILL
    else:
        if kind == "link":
            cluster.link(2, "down")
        else:
            cluster.kill(2)
        threading.Timer(rng.uniform(2, 12), cluster.revive, [2]).start()
        return kind
    for victim in victims:
        victim.send_signal(number)
    return f"{kind} of node {node}"


@pytest.mark.timeout(1200)
def test_twenty_random_faults(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    seed = int(os.environ.get("CLOZE_SOAK_SEED", time.time_ns() % 2**32))
    print(f"\nCLOZE_SOAK_SEED={seed}")
    rng = random.Random(seed)
    expected = trainer.run(f"data.path={corpus}", *SETTINGS, ranks=2, timeout=300)
    assert expected.codes == (0, 0), expected.stderrs
    cluster = Cluster(tmp_path)
    started = time.monotonic()
    try:
        run = Training(cluster, tmp_path / "soak", f"data.path={corpus}", *SETTINGS, *LAUNCH)
        for fault in range(1, FAULTS + 1):
            reached = max((line["step"] for line in read_metrics(run.run)), default=0)
            run.wait_for(reached + rng.randint(5, 40), seconds=180)
            restarts = run.output.count("; restart ")
            print(f"{time.monotonic() - started:5.0f} s  step {reached:4}  fault {fault:2}: {strike(cluster, rng)}")
            noticed = time.monotonic() + 15  # a short gap in the link may need no restart
            while run.output.count("; restart ") == restarts and time.monotonic() < noticed:
                time.sleep(0.2)
        assert run.wait(300) == 0, run.output
        print(f"{time.monotonic() - started:5.0f} s  finished after {run.output.count('; restart ')} restarts")
        losses = {line["step"]: line["train/loss"] for line in expected.metrics if "train/loss" in line}
        assert run.losses == pytest.approx(losses, rel=1e-4)
        left = [process.cmdline() for node in NODES for process in cluster.processes(node)]
        assert left == []
    finally:
        cluster.close()
