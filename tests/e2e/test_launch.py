"""Agents and real deepspeed launchers over a stub in the place of training: what arrives, what ends, what is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.command import LOCALHOST
from launch.job import Job
from launch.supervise import supervise
from tests.support import environment, free_port, rank_environment

ODD = [
    "a={0..3}",
    "b=${oc.env:X}",
    "c=$(id)",
    "d=%n",
    "e='\"",
    "f= g ",
    "h=日本 ü",
    "i=*",
    "j=\n",
    "--k",
    "l=;ls|&",
    "~",
    "",
]

STUB = """
import json, os, psutil, signal, subprocess, sys, time
from pathlib import Path
here, mode, *rest = sys.argv[1:]
here, rank = Path(here), os.environ["RANK"]

def status(code):
    if rank == "0":
        (here / "status.json").write_text(json.dumps({"exit_code": code, "step": 1, "time": time.time()}))
    sys.exit(code)

def note(name, value):
    (here / f"{name}-{rank}.part").write_text(json.dumps(value))
    (here / f"{name}-{rank}.part").rename(here / f"{name}-{rank}")

if mode == "say":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS", "SECRET")
    note("said", [rest, {name: os.environ.get(name) for name in names}])
    status(0)
stopped = []
signal.signal(signal.SIGTERM, (lambda *_: None) if mode == "deaf" else lambda *_: stopped.append(1))
# what a rank may leave behind: a process that, where we have time to wait for it, hears no SIGTERM
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); " if mode == "obey" else "import time; "
deaf += "time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
note("ready", [os.getpid(), child.pid])
while not all((here / f"ready-{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.05)
if mode == "kill_launcher":
    os.kill(os.getppid(), signal.SIGKILL)
if mode == "kill_agent":
    os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)
if mode == f"kill_rank_{rank}":
    os.kill(os.getpid(), signal.SIGKILL)
while not stopped:
    time.sleep(0.05)
if mode.startswith("kill_rank"):  # as training does whose peer is gone
    status(71)
time.sleep(1)  # saving
assert mode != "fail", "the save failed"
note("saved", True)
status(75)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "stub_training.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield tmp_path
    for file in tmp_path.glob("ready-?"):  # in case a test fails
        for pid in json.loads(file.read_text()):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def launch(here: Path, mode: str, *rest: str) -> int:
    job = Job(
        overrides=(str(here), mode, *rest),
        hosts={LOCALHOST: 2},
        run_dir=str(here),
        module="stub_training",
        environment={},
    )
    return supervise(job)


def in_a_process(here: Path, mode: str) -> subprocess.Popen[bytes]:
    """`launch` as a process of its own, in a group of its own as a shell makes it, so that it can be sent signals."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_launch import launch
sys.exit(launch(Path({str(here)!r}), {mode!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], process_group=0)


def wait_for(here: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((here / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear in {sorted(p.name for p in here.iterdir())}"
        time.sleep(0.05)


def alive(here: Path) -> list[int]:
    pids = [pid for file in here.glob("ready-?") for pid in json.loads(file.read_text())]
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_overrides_arrive_unchanged_on_every_rank(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(stub, "say", *ODD) == 0
    for rank in range(2):
        arguments, environment = json.loads((stub / f"said-{rank}").read_text())
        assert arguments == ODD
        assert environment.pop("MASTER_PORT").isdecimal()
        assert environment == {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "2", "SECRET": "hunter2",
        }  # fmt: skip
    assert "oc.env" not in "".join(capfd.readouterr()), "the launcher must not log overrides"


@pytest.mark.slow
def test_a_signal_stops_in_order_and_leaves_nothing(stub: Path) -> None:
    (stub / "status.json").write_text('{"exit_code": 0}')  # of an earlier run
    process = in_a_process(stub, "obey")
    wait_for(stub, "ready-0", "ready-1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert (stub / "saved-0").exists()
    assert (stub / "saved-1").exists()
    assert alive(stub) == []


@pytest.mark.slow
def test_a_second_signal_kills(stub: Path) -> None:
    process = in_a_process(stub, "deaf")
    wait_for(stub, "ready-0", "ready-1")
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "the first signal waits for the ranks"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 70
    assert alive(stub) == []


@pytest.mark.slow
def test_ctrl_c_stops_this_job_only(stub: Path) -> None:
    """As a terminal sends it, to the whole group; a second job on the machine goes on."""
    folders = [stub / "one", stub / "other"]
    jobs = []
    for folder in folders:
        folder.mkdir()
        jobs.append(in_a_process(folder, "obey"))
    try:
        for folder in folders:
            wait_for(folder, "ready-0", "ready-1")
        os.killpg(jobs[0].pid, signal.SIGINT)
        assert jobs[0].wait(60) == 75
        assert alive(folders[0]) == []
        time.sleep(1)
        assert jobs[1].poll() is None
        assert len(alive(folders[1])) == 4
        assert not (folders[1] / "saved-0").exists()
    finally:
        jobs[1].send_signal(signal.SIGTERM)
        assert jobs[1].wait(60) == 75
    assert alive(folders[1]) == []


@pytest.mark.slow
def test_a_stop_that_fails_is_no_orderly_stop(stub: Path) -> None:
    """75 would say that there is a checkpoint."""
    process = in_a_process(stub, "fail")
    wait_for(stub, "ready-0", "ready-1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 70
    assert alive(stub) == []


def test_a_check_whose_ranks_do_not_meet_is_one_line(tmp_path: Path) -> None:
    """As with a firewall that drops what it does not like: the second rank is never heard of."""
    code = "import sys; from pathlib import Path; from launch.preflight import speed; speed._START_SECONDS = 3; "
    code += "sys.exit(speed.main(Path(sys.argv[1]), ['a', 'b']))"
    ours = environment() | rank_environment(0, 2, free_port()) | {"CROSS_RANK": "0", "GLOO_SOCKET_IFNAME": "eth9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=ours, timeout=100, check=False
    )
    assert done.returncode == 64, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: a, b: no connection between their ranks over GLOO_SOCKET_IFNAME=eth9 (silence for 3 s)"
    )


def test_a_killed_launcher_is_a_failure_without_orphans(stub: Path) -> None:
    """deepspeed leaves the ranks running; they still get the time to save."""
    code = launch(stub, "kill_launcher")
    assert (stub / "saved-0").exists()
    assert code == 75, "the ranks ended in order, and said so"
    assert alive(stub) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_one_thing_to_launch_and_to_the_run(
    stub: Path, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    """`kill -9`, or the system for want of memory: 71, in status.json, too, where rank 0 lives to write it."""
    assert launch(stub, f"kill_rank_{rank}") == 71
    assert "a rank was killed (SIGKILL; " in capfd.readouterr().err
    if rank:
        assert json.loads((stub / "status.json").read_text())["exit_code"] == 71
    assert alive(stub) == []


@pytest.mark.slow
def test_a_killed_agent_leaves_no_orphans(stub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A second agent finds the ranks of the first by their mark."""
    assert launch(stub, "kill_agent") == 70
    assert "launch: localhost: lost" in capfd.readouterr().err
    assert alive(stub) == []
