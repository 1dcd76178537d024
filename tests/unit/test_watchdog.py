"""The watchdog ends a process that hangs; a request to stop survives any number of signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.watchdog import StopRequest, Watchdog
from tests.support import environment

HANGS = """
import sys, threading, time
from pathlib import Path
from pretrain.watchdog import Watchdog

def deep_inside():
    threading.Event().wait({wait})

dog = Watchdog({seconds}, folder=Path(sys.argv[1]), rank=3, slow_seconds={slow})
for _ in range({ticks}):
    time.sleep(0.1)
    dog.tick()
{then}
deep_inside()
"""


def run(
    folder: Path, *, seconds: float, wait: float, ticks: int = 0, then: str = "", slow: float | None = None
) -> tuple[int, str, float]:
    """(exit code, stderr, seconds it took)"""
    script = HANGS.format(seconds=seconds, wait=wait, ticks=ticks, then=then, slow=slow)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment(), capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stderr, time.monotonic() - start


def test_a_process_that_hangs_exits_71_and_leaves_its_stacks(tmp_path: Path) -> None:
    code, stderr, _ = run(tmp_path, seconds=0.3, wait=25)
    assert code == 71
    first = stderr.splitlines()[0]
    path = tmp_path / "stacks-rank3.txt"
    assert first.startswith("error: rank 3: no progress for 0 s (watchdog.seconds=0.3)")
    assert str(path) in first
    for text in (stderr, path.read_text()):
        assert "in deep_inside" in text
        assert "Thread" in text


def test_ticks_keep_it_quiet_until_they_end(tmp_path: Path) -> None:
    code, _, seconds = run(tmp_path, seconds=0.5, wait=25, ticks=12)
    assert code == 71
    assert seconds > 1.2 + 0.5


def test_the_start_and_the_end_of_a_run_may_take_longer(tmp_path: Path) -> None:
    """Until the first tick, and after one that tells of a slow part; one of the two limits may be none."""
    start = "time.sleep(0.8); dog.tick(); dog.tick(slow=True); time.sleep(0.8); dog.tick()"
    for slow, then, expected in ((2, start, 71), (0, start, 71), (0.3, "time.sleep(25)", 71), (0, "", 0)):
        code, stderr, _ = run(tmp_path, seconds=0.4, slow=slow, wait=1, then=then)
        assert code == expected, stderr
        assert not stderr or f"start_seconds={slow}" in stderr or slow != 0.3
        assert ("in deep_inside" in stderr) == (then == start)  # not before, in the slow parts


@pytest.mark.parametrize(("seconds", "then"), [(0, ""), (0.2, "dog.close()")])
def test_off_and_closed_it_never_acts(tmp_path: Path, seconds: float, then: str) -> None:
    code, stderr, _ = run(tmp_path, seconds=seconds, wait=0.8, then=then)
    assert (code, stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_it_acts_where_nothing_can_be_written(tmp_path: Path) -> None:
    code, stderr, _ = run(tmp_path / "nowhere", seconds=0.2, wait=25)
    assert code == 71
    assert "in deep_inside" in stderr


def test_it_acts_in_the_process_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    dog = Watchdog(0.05, tmp_path, rank=0)
    end = time.monotonic() + 10
    while not codes and time.monotonic() < end:
        time.sleep(0.01)
    dog.close()
    assert codes
    assert set(codes) == {71}


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_under_nohup_a_closed_terminal_is_no_request() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_request_to_stop_is_noted_however_often_it_comes(number: int) -> None:
    stop = StopRequest()
    assert not stop.requested
    for _ in range(20):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_a_signal_does_not_break_what_is_under_way(tmp_path: Path) -> None:
    """A sleeping, writing process goes on after it."""
    script = (
        "import os, signal, time\n"
        "from pretrain.watchdog import StopRequest\n"
        "stop = StopRequest()\n"
        "print('ready', flush=True)\n"
        "start = time.monotonic()\n"
        "time.sleep(0.6)\n"
        "assert time.monotonic() - start > 0.5\n"
        "print(stop.requested, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        for _ in range(5):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        assert process.stdout.read() == "True\n"
        assert process.wait(10) == 0


def test_the_watchdog_of_a_job_that_failed_does_not_watch_over_the_next(tmp_path: Path) -> None:
    """Of a sweep: nobody ticks it any more, and it would end the process in the middle of the next run."""
    from pretrain.session import Job
    from pretrain.watchdog import STOP_SIGNALS

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"runs_root={tmp_path}"])
        first = Job(config)
        first.leave()  # as after an error: with no orderly code
        assert not first.watchdog.closed
        second = Job(config)
        assert first.watchdog.closed
        second.code = 0
        second.leave()
        assert second.watchdog.closed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
