"""Runs on two nodes by other people's launchers, where names resolve as badly as on a fresh Debian.

node1 is 127.0.1.1 to itself, node2 knows no node2, and nobody tells gloo an interface. Every run must give the losses
of one on two ranks of one node, and leave no process behind.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cloze.arrival import sealed
from tests.cluster.cluster import NODES, Cluster, why_not
from tests.support import TINY, Trainer, later_wins, read_metrics

STEPS = 60
NASTY = "['{0..3}','$(id) *','%n','日本']"
PYTHON, TRAIN = sys.executable, "pretrain/train.py"
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
NODE_1 = {"MASTER_ADDR": "node1", "MASTER_PORT": "29512", "WORLD_SIZE": "2"}  # as Kubernetes names a service


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("named"), named=True)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_left(cluster: Cluster) -> Iterator[None]:
    yield
    wait_for_the_end_of_all(cluster)


def wait_for_the_end_of_all(cluster: Cluster) -> None:
    end = time.monotonic() + 200  # daemons of mpirun end after it
    while left := [process.pid for node in NODES for process in cluster.processes(node)]:
        assert time.monotonic() < end, [psutil.Process(pid).cmdline() for pid in left if psutil.pid_exists(pid)]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer, corpus: Path) -> dict[int, float]:
    return losses_of(trainer, corpus, f"steps={STEPS}")


def losses_of(trainer: Trainer, corpus: Path, *overrides: str) -> dict[int, float]:
    result = trainer.run(f"data.path={corpus}", *overrides, ranks=2, timeout=400)
    assert set(result.codes) <= {0, 75}, result.stderrs
    return {line["step"]: line["train/loss"] for line in result.metrics if "train/loss" in line}


class Run:
    """A run by a launcher: a command for each node that needs one."""

    def __init__(self, cluster: Cluster, corpus: Path, folder: Path) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        own = (f"data.path={corpus}", f"runs_root={folder}", "run=run", f"steps={STEPS}", "checkpoint.every=20")
        self.overrides = later_wins(*TINY, *own)
        self.ssh = folder / "bin" / "ssh"
        if not self.ssh.exists():
            self.ssh.parent.mkdir()
            self.ssh.write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {cluster.ssh_config} "$@"\n')
            self.ssh.chmod(0o755)
        (folder / "env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        self.processes: list[psutil.Popen] = []

    def start(self, node: int, *command: str, **more: str) -> "Run":
        environment = {
            "PATH": f"{self.ssh.parent}:{os.environ['PATH']}",
            "DS_ENV_FILE": str(self.folder / "env"),
            **more,
        }
        log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        self.processes.append(self.cluster.start([*command, *self.overrides], log, environment, node))
        return self

    def by(self, launcher: str) -> "Run":
        if launcher in ("pdsh", "openmpi"):
            agent = f"--mca plm_rsh_agent {self.ssh} --mca btl_tcp_if_include 10.251.7.0/24"
            more = ["--launcher=openmpi", f"--launcher_args={agent}"] if launcher == "openmpi" else []
            runner = (PYTHON, "-m", "deepspeed.launcher.runner", f"--hostfile={self.cluster.hosts}", *more)
            return self.start(1, *runner, TRAIN, **ROOT_MAY)
        if launcher == "mpirun":
            more = ["-x", "DS_ACCELERATOR", "-x", "OMP_NUM_THREADS", "--mca", "plm_rsh_agent", str(self.ssh)]
            return self.start(1, "mpirun", "-np", "2", "--host", "node1,node2", *more, PYTHON, TRAIN, **ROOT_MAY)
        for node in NODES:
            if launcher == "torchrun":
                self.torchrun(node, "--nnodes=2")
            else:
                self.start(node, PYTHON, TRAIN, **NODE_1, RANK=str(node - 1))
        return self

    def torchrun(self, node: int, *options: str) -> "Run":
        is_host = f"--rdzv-conf=is_host={node == 1},last_call_timeout=2"  # else it asks for node 2's address by name
        meeting = ("--rdzv-backend=c10d", "--rdzv-endpoint=10.251.7.1:29400", is_host, "--nproc-per-node=1")
        command = (PYTHON, "-m", "torch.distributed.run", *meeting, *options, TRAIN)
        return self.start(node, *command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1" if "--nnodes=1:2" in options else "0")

    def wait_for(self, step: int) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in read_metrics(self.run)))

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + 600
        while not is_so():
            assert all(process.poll() is None for process in self.processes), self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def wait(self) -> list[int]:
        codes = [process.wait(600) for process in self.processes]
        self.processes = []
        return codes

    @property
    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log-*")))

    @property
    def losses(self) -> dict[int, float]:
        return {line["step"]: line["train/loss"] for line in read_metrics(self.run) if "train/loss" in line}

    @property
    def ranks(self) -> int:
        return int(json.loads((self.run / "environment.json").read_text())["world_size"])


def skip_without(launcher: str) -> None:
    if launcher in ("openmpi", "mpirun") and not shutil.which("mpirun"):
        pytest.skip("needs mpirun (Debian: openmpi-bin)")


def assert_same(losses: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(losses) == sorted(expected)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "kubernetes"])
def test_losses_are_those_of_one_node(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], launcher: str
) -> None:
    skip_without(launcher)
    run = Run(cluster, corpus, tmp_path)
    if launcher == "pdsh":
        run.overrides = sealed([*run.overrides, f"wandb.tags={NASTY}"])  # as `launch quote` prints them
    run.by(launcher)
    assert {*run.wait()} == {0}, run.output
    assert run.ranks == 2
    if launcher == "pdsh":
        assert yaml.safe_load((run.run / "config.yaml").read_text())["wandb"]["tags"] == [
            "{0..3}",
            "$(id) *",
            "%n",
            "日本",
        ]
    assert_same(run.losses, undisturbed)


@pytest.mark.parametrize(("launcher", "number"), [("mpirun", signal.SIGUSR1), ("torchrun", signal.SIGTERM)])
def test_an_orderly_stop_and_the_same_command_again(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], launcher: str, number: int
) -> None:
    """By the signal that the launcher passes on and gives time for; its own exit code it chooses itself."""
    skip_without(launcher)
    run = Run(cluster, corpus, tmp_path).by(launcher)
    run.wait_for(25)
    run.processes[0].send_signal(number)
    assert 0 not in run.wait()[:1], run.output
    stopped = json.loads((run.run / "status.json").read_text())
    assert stopped["exit_code"] == 75, run.output
    assert 25 <= stopped["step"] < STEPS
    again = Run(cluster, corpus, tmp_path).by(launcher)
    assert {*again.wait()} == {0}, again.output
    assert f"resuming at step {stopped['step']}" in again.output
    assert_same(again.losses, undisturbed)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("pdsh", signal.SIGKILL), ("pdsh", signal.SIGTERM), ("mpirun", signal.SIGKILL), ("kubernetes", signal.SIGKILL)],
)
def test_a_rank_that_is_killed_or_told_to_stop_and_the_same_command_again(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], launcher: str, number: int
) -> None:
    """The one on node 2: both end, and nothing is left, whatever the launcher does."""
    skip_without(launcher)
    run = Run(cluster, corpus, tmp_path).by(launcher)
    run.wait_for(25)
    run.wait_until((run.run / "checkpoints" / "LATEST").exists)
    (rank,) = [process for process in cluster.processes(2) if TRAIN in process.cmdline()[1:3]]
    rank.send_signal(number)
    run.wait()
    wait_for_the_end_of_all(cluster)
    stopped = json.loads((run.run / "status.json").read_text()) if number == signal.SIGTERM else None
    assert stopped is None or stopped["exit_code"] == 75, run.output
    again = Run(cluster, corpus, tmp_path).by(launcher)
    assert {*again.wait()} == {0}, again.output
    assert f"resuming at step {stopped['step'] if stopped else ''}" in again.output
    assert_same(again.losses, undisturbed)


@pytest.mark.timeout(1800)
def test_torchrun_with_a_node_that_joins_and_a_rank_that_is_killed(
    cluster: Cluster, trainer: Trainer, corpus: Path, tmp_path: Path
) -> None:
    """--nnodes=1:2: one rank trains until the other node comes; then one is killed, and both start again."""
    run = Run(cluster, corpus, tmp_path)
    run.overrides = later_wins(*run.overrides, "steps=100000")
    elastic = ("--nnodes=1:2", "--max-restarts=3", "--monitor-interval=0.2")
    run.torchrun(1, *elastic)
    run.wait_for(5)
    assert run.ranks == 1
    run.torchrun(2, *elastic)
    end = time.monotonic() + 200
    while run.ranks == 1:
        assert time.monotonic() < end, run.output
        time.sleep(0.1)
    known = max(run.losses)
    run.wait_for(known + 25)
    (rank,) = [p for p in cluster.processes(2) if TRAIN in p.cmdline() and "torch.distributed.run" not in p.cmdline()]
    rank.kill()
    run.wait_for(max(run.losses) + 25)
    for process in run.processes:
        process.send_signal(signal.SIGTERM)
    run.wait()
    assert "1 ranks before, 2 now" in run.output
    expected = losses_of(trainer, corpus, "steps=100000", f"stop_at={max(run.losses)}")
    assert_same(run.losses, expected)
