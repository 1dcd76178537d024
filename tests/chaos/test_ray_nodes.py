"""A Ray cluster of two nodes (`ray start`, as on two machines): one, and the driver, are killed while it prepares."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.unit.corpora import ROOT, documents, files_of, vocabulary, write_jsonl

RAY = {
    **os.environ,
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # Ray's default; the nodes and the driver share a token
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_health_check_period_ms": "1000",  # it would take fifteen seconds to find a node dead
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def node(log: Path, *options: str) -> Iterator[psutil.Process]:
    """One node, with a CPU; killed at the end with everything that it has started."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", *options]
    with log.open("w") as file, subprocess.Popen(command, env=RAY, stdout=file, stderr=file) as process:
        tree = psutil.Process(process.pid)
        try:
            yield tree
        finally:
            kill(tree)


def kill(tree: psutil.Process) -> None:
    for process in [*tree.children(recursive=True), tree] if tree.is_running() else ():
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def tasks_of(tree: psutil.Process) -> int:
    """How many preparation tasks the node is at work on."""
    found = 0
    for process in tree.children(recursive=True):
        try:
            found += "ray::_ray_task" in " ".join(process.cmdline())
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_killed_node_and_a_killed_driver_change_no_byte(tmp_path):
    pytest.importorskip("ray")
    for number in range(4):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(2500, number))
    vocabulary(tmp_path / "vocab.txt")
    prepare = [
        sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{tmp_path}/*.jsonl]", "max_len=64",
        "bucket_mib=1", f"tokenizer.path={tmp_path}/vocab.txt",
    ]  # fmt: skip
    subprocess.run([*prepare, f"out={tmp_path}/local"], cwd=ROOT, check=True, capture_output=True, timeout=200)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short,  # its sockets want short names
        node(
            tmp_path / "head.log", "--head", f"--port={address.rpartition(':')[2]}",
            "--include-dashboard=false", f"--temp-dir={short}", "--object-store-memory=100000000",
        ) as head,
    ):  # fmt: skip
        wait_until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 60)
        with node(tmp_path / "other.log", f"--address={address}", "--object-store-memory=100000000") as other:
            wait_until(lambda: "Ray runtime started" in (tmp_path / "other.log").read_text(), 60)
            command = [*prepare, f"out={tmp_path}/ray", "executor=ray", f"executor.address={address}"]
            with subprocess.Popen(command, cwd=ROOT, env=RAY, stderr=subprocess.PIPE, text=True) as driver:
                wait_until(lambda: tasks_of(head) and tasks_of(other), 60)
                assert driver.poll() is None
                kill(other)
                _, stderr = driver.communicate(timeout=120)
            assert driver.returncode == 0, stderr
        print(stderr)
        command = [
            *prepare,
            f"out={tmp_path}/again",
            "executor=ray",
            f"executor.address={address}",
            "executor.workers=2",
        ]
        with subprocess.Popen(command, cwd=ROOT, env=RAY, stderr=subprocess.DEVNULL) as driver:
            wait_until(lambda: any((tmp_path / "again" / ".work").glob("map/*")), 60)
            assert driver.poll() is None
            driver.kill()
        assert not (tmp_path / "again" / "manifest.json").exists()
        run = subprocess.run(command, cwd=ROOT, env=RAY, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
    for out in ("ray", "again"):
        assert files_of(tmp_path / out) == files_of(tmp_path / "local")
