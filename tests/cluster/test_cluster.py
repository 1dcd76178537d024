"""Runs on two nodes through `python -m launch`, and what can happen to them.

Every run must give the losses of one that nothing happened to, and leave no process behind on either node. They wait
most of the time: with `-n 2` there are two clusters, each with half of the cases.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cluster.cluster import NODES, Cluster, Training, why_not
from tests.support import TINY, Trainer, later_wins, read_metrics

STEPS = 160
LONG = (f"steps={STEPS}", "checkpoint.every=20", "checkpoint.keep_last=2", "watchdog.seconds=0")
NASTY = "['{0..3}','${oc.env:NONE,x}','$(id)','%n','\"it`s\"',' a  b ','日本 ü','*','~',';ls|&','\\\\']"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    for node in NODES:
        cluster.revive(node)
    yield
    for node in NODES:
        assert [(process.pid, process.cmdline()) for process in cluster.processes(node)] == []


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, corpus: Path) -> dict[int, float]:
    """Losses of a run on two ranks of one node."""
    result = trainer.run(f"data.path={corpus}", *LONG, ranks=2)
    assert result.codes == (0, 0), result.stderrs
    return {line["step"]: line["train/loss"] for line in result.metrics if "train/loss" in line}


def assert_same(losses: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(losses) == sorted(expected)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("zero", [1, 3])
def test_losses_are_those_of_one_node(
    cluster: Cluster, trainer: Trainer, corpus: Path, tmp_path: Path, zero: int
) -> None:
    """And overrides are: whatever a shell would make of them."""
    overrides = (f"data.path={corpus}", "steps=20", f"zero={zero}", f"wandb.tags={NASTY}")
    here = trainer.run(*overrides, ranks=2)
    assert here.codes == (0, 0), here.stderrs
    run = Training(cluster, tmp_path / "a b", *overrides)
    assert run.wait() == 0, run.output
    assert list(run.losses.values()) == pytest.approx(here.series("train/loss"), rel=1e-6)
    there, expected = ((folder / "config.yaml").read_text().split("tags:")[1] for folder in (run.run, here.run))
    assert there == expected
    assert json.loads((run.run / "environment.json").read_text())["world_size"] == 2


def test_a_killed_rank(cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """Under ZeRO 3. On the way: what of launch's environment comes to the other node, and that no secret shows."""
    more = {"WANDB_API_KEY": "hunter2", "MY_PASSWORD": "hunter3"}
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "zero=3", more=more)
    run.wait_for(45)
    (rank,) = cluster.ranks(2)
    arrived = rank.environ()
    assert (arrived.get("WANDB_API_KEY"), arrived.get("MY_PASSWORD")) == ("hunter2", None)
    shown = [" ".join(process.cmdline()) for node in NODES for process in cluster.processes(node)]
    rank.kill()
    assert run.wait() == 0, run.output
    assert "hunter" not in run.output + "".join(shown)
    assert re.search(r"launch: .*a rank died; restart 1 of 3", run.output), run.output
    assert_same(run.losses, undisturbed)


@pytest.mark.parametrize(("lost", "left"), [(2, 1), (1, 2)])
def test_a_lost_node(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], lost: int, left: int
) -> None:
    """Either one: rank 0, its store and its checkpoints' writer are on node 1. The user asked for two ranks."""
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "lost_after=6", "world_size=2", at=left)
    run.wait_for(45)
    cluster.kill(lost)
    assert run.wait() == 0, run.output
    assert f"node{lost}: lost" in run.output
    assert f"going on without node{lost}" in run.output
    assert "2 ranks before, 1 now" in run.output
    assert_same(run.losses, undisturbed)
    assert json.loads((run.run / "environment.json").read_text())["world_size"] == 1


def test_ranks_end_within_a_minute_of_a_lost_peer(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """As launch is by default: GPUs that wait for a dead node cost as much as others."""
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "steps=100000", "restarts=0")
    run.wait_for(10)
    cluster.kill(2)
    start = time.monotonic()
    while cluster.ranks(1):
        assert time.monotonic() - start < 60, run.output
        time.sleep(0.2)
    print(f"\nranks of node 1 ended {time.monotonic() - start:.0f} s after node 2 was lost")
    assert run.wait() == 70, run.output
    assert "node2: lost" in run.output


def test_a_first_host_that_is_this_one(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Into which the user came through a tunnel: by 127.0.0.1, where no other host finds rank 0."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\nnode2 slots=1\n")
    more = {"SSH_CONNECTION": "127.0.0.1 40000 127.0.0.1 22"}
    run = Training(cluster, tmp_path / "runs", f"data.path={corpus}", "steps=5", hosts=hosts, more=more)
    assert run.wait(120) == 0, run.output
    assert json.loads((run.run / "environment.json").read_text())["world_size"] == 2


def test_a_rank_that_stands_still(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "watchdog.seconds=8")
    run.wait_for(45)
    (rank,) = cluster.ranks(1)
    rank.send_signal(signal.SIGSTOP)
    assert run.wait() == 0, run.output
    assert "node2: no progress" in run.output
    assert "\nnode2: error: rank 1: no progress for" in run.output, "its lines bear its name"
    assert_same(run.losses, undisturbed)


@pytest.mark.parametrize(("lost_after", "restarts"), [(100, 0), (6, 1)])
def test_a_link_that_is_down_for_half_a_minute(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], lost_after: int, restarts: int
) -> None:
    """With patience the connections outlive it; without, the run starts again, and waits for the node to come back."""
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, f"lost_after={lost_after}")
    run.wait_for(45)
    cluster.link(2, "down")
    time.sleep(30)
    cluster.link(2, "up")
    assert run.wait() == 0, run.output
    assert run.restarts == restarts, run.output
    assert_same(run.losses, undisturbed)
    assert json.loads((run.run / "environment.json").read_text())["world_size"] == 2


def test_ctrl_c_and_a_launch_that_is_killed(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """An orderly stop on both nodes; then launch dies, and the nodes' agents end their ranks."""
    run = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "steps=100000", "lost_after=6")
    run.wait_for(30)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 75, run.output
    again = Training(cluster, tmp_path, f"data.path={corpus}", *LONG, "steps=100000", "lost_after=6")
    again.wait_for(max(run.losses) + 20)
    again.process.kill()
    again.wait()
    deadline = time.monotonic() + 30
    while any(cluster.processes(node) for node in NODES):
        assert time.monotonic() < deadline, [p.cmdline() for node in NODES for p in cluster.processes(node)]
        time.sleep(0.2)


def checked(cluster: Cluster, corpus: Path, folder: Path, **more: str) -> tuple[int, str]:
    arguments = (f"hosts={cluster.hosts}", f"ssh=ssh -F {cluster.ssh_config}", f"runs_root={folder}", "run=run")
    command = [sys.executable, "-m", "launch", "check", *arguments, *TINY, f"data.path={corpus}"]
    code = cluster.start(command, folder / "log", more).wait(200)
    return code, (folder / "log").read_text()


def test_check_finds_what_differs(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    code, output = checked(cluster, corpus, tmp_path)
    assert code == 0, output
    for words in ("all-reduce over 2 ranks: right", "slowest host: node", "slowest link: node", "fit to train"):
        assert words in output
    code, output = checked(cluster, corpus, tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert code == 64
    (line,) = (line for line in output.splitlines() if "error:" in line)
    assert line.startswith("error: node1, node2: no connection between their ranks over GLOO_SOCKET_IFNAME=lo (")
    assert "Traceback" not in output
    other = tmp_path / "other" / "torch-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    cluster.start_sshd(2, f"SetEnv PYTHONPATH={other.parent}")
    try:
        code, output = checked(cluster, corpus, tmp_path)
        assert code == 64
        errors = [line for line in output.splitlines() if line.startswith("error:")]
        assert errors == [f"error: node2: torch is 9.9.9, node1 has {version('torch')}; make them equal"]
        cluster.stop_sshd(2)
        code, output = checked(cluster, corpus, tmp_path)
        assert code == 64
        (line,) = (line for line in output.splitlines() if line.startswith("error:"))
        assert line.startswith("error: node2: ")
        assert "see that `ssh node2 true` works" in line
    finally:
        cluster.start_sshd(2)


def test_plain_deepspeed(cluster: Cluster, trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """DeepSpeed's own launcher over pdsh trains as well; without its hostfile it would train here, and is refused."""
    here = trainer.run(f"data.path={corpus}", "steps=5", ranks=2)
    arguments = later_wins(*TINY, f"data.path={corpus}", f"runs_root={tmp_path}", "run=run", "steps=5")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {cluster.ssh_config} "$@"\n')
    (tools / "ssh").chmod(0o755)
    for hosts, code in ((tmp_path / "mistyped", 64), (cluster.hosts, 0)):
        log = tmp_path / f"log-{code}"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hosts}", "--master_addr=10.251.7.1"]
        process = cluster.start(
            [*command, "pretrain/train.py", *arguments],
            log,
            {"PATH": f"{tools}:{os.environ['PATH']}", "DS_ENV_FILE": str(tmp_path / "env")},
        )
        (tmp_path / "env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        assert process.wait(120) == code, log.read_text()
        assert (f"error: --hostfile={hosts}: not there" in log.read_text()) == bool(code)
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx(here.series("train/loss"), rel=1e-6)
