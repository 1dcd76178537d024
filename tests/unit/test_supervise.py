"""When launch starts a run again, where, after which pause, and when it gives up: with a clock that the test turns."""

import os
import signal
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cloze.errors import UserError
from launch import supervise
from launch.agent import CRASHED, ENDED
from launch.job import Job
from launch.nodes import LOST
from launch.supervise import Stop


class World:
    """Two hosts and a clock. `ends` are the starts of a run: how long each takes, and its nodes' exit codes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Iterable[tuple[float, dict[str, int]]]) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self.started_on: list[list[str]] = []
        self.dead: set[str] = set()
        self.revive_at = float("inf")
        self.alerts: list[str] = []
        self._ends = iter(ends)
        monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))
        monkeypatch.setattr(supervise, "connect", self._connect)
        monkeypatch.setattr(supervise, "attempt", self._attempt)
        monkeypatch.setattr(Stop, "sleep", lambda stop, seconds: self._sleep(seconds))

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def _connect(self, hosts: list[str], *_: Any) -> dict[str, Any]:
        if self.now >= self.revive_at:
            self.dead = set()
        return {host: SimpleNamespace(close=lambda: None) for host in hosts if host not in self.dead}

    def _attempt(self, job: Job, nodes: dict[str, Any], stop: Stop) -> dict[str, int]:
        self.started_on.append(list(nodes))
        seconds, codes = next(self._ends)
        self.now += seconds
        self.dead |= {host for host, code in codes.items() if code == LOST}
        return {host: codes.get(host, 0) for host in nodes}

    def run(self, **changes: Any) -> int:
        defaults: dict[str, Any] = {"overrides": (), "hosts": {"a": 1, "b": 1}, "environment": {}, "restarts": 3}
        return supervise.supervise(Job(**defaults | {"alert": self.alerts.append} | changes))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


CRASH = {"a": ENDED, "b": CRASHED}
LONG = 600.0


def test_restarts_are_counted_within_an_hour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten faults, fewer than four in any hour, are survived; the fourth within one ends the run, with an alert."""
    world = World(monkeypatch, [*[(1300.0, CRASH)] * 10, (5.0, {})])
    assert world.run() == 0
    assert len(world.started_on) == 11
    assert world.alerts == []
    world = World(monkeypatch, [(1000.0, CRASH)] * 9)
    assert world.run() == 70
    assert len(world.started_on) == 4
    assert world.alerts == ["a: ended; b: a rank died; given up after 3 restarts within an hour"]
    assert "launch: a: ended; b: a rank died; restart 3 of 3 in 2 s\n" in capsys.readouterr().err


def test_pauses_grow_while_starts_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, [*[(5.0, CRASH)] * 7, (LONG, CRASH), (5.0, CRASH), (5.0, {})])
    assert world.run(restarts=20) == 0
    assert world.pauses == [4, 8, 16, 32, 60, 60, 60, 2, 4]


@pytest.mark.parametrize(
    ("codes", "settings", "expected", "starts"),
    [
        ({"a": 64, "b": ENDED}, {}, 64, 1),
        ({"a": ENDED, "b": 70}, {}, 70, 1),
        ({"a": 74, "b": ENDED}, {}, 74, 1),
        ({"a": 71, "b": CRASHED}, {}, 0, 2),
        ({"a": 75, "b": 75}, {}, 0, 2),  # nobody here asked for it
        ({"a": 75, "b": 75}, {"stops": True}, 75, 1),  # stop_at did
        ({"a": 75, "b": 75}, {"restarts": 0}, 75, 1),
        (CRASH, {"restarts": 0}, 70, 1),
        ({"a": 71, "b": ENDED}, {"restarts": 0}, 71, 1),
    ],
)
def test_what_is_started_again(
    codes: dict[str, int], settings: dict[str, int], expected: int, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, [(LONG, codes), (LONG, {})])
    assert world.run(**settings) == expected
    assert len(world.started_on) == starts


def test_a_lost_host_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks may still train; then the run goes on without it, until the next restart finds it again."""
    world = World(monkeypatch, [(LONG, {"b": LOST}), (LONG, {"a": CRASHED}), (LONG, {})])
    world.revive_at = 1000.0 + 2 * LONG
    assert world.run() == 0
    assert world.started_on == [["a", "b"], ["a"], ["a", "b"]]
    assert world.pauses == [2, 50, 2]


def test_a_run_that_needs_both_hosts_waits_for_an_hour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So does one that has lost all of its hosts to a switch that starts anew: it uses up one restart, no more."""
    for lost in ({"b": LOST}, {"a": LOST, "b": LOST}):
        world = World(monkeypatch, [(LONG, lost), (LONG, {})])
        world.revive_at = 1000.0 + LONG + 900
        assert world.run(fits=lambda ranks: ranks == 2) == 0
        assert world.started_on == [["a", "b"]] * 2
        assert 900 < sum(world.pauses) < 1000
    world = World(monkeypatch, [(LONG, {"a": LOST, "b": LOST})])
    assert world.run() == 70
    assert 3600 < sum(world.pauses) < 3800
    assert world.alerts[0].startswith("too few hosts answer")
    assert (
        "no answer from a, b; the global batch cannot be split over the others; trying again" in capsys.readouterr().err
    )


def test_at_first_all_hosts_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, [])
    world.dead = {"b"}
    with pytest.raises(UserError, match="no answer from b; see that `ssh HOST true` works"):
        world.run()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({"a": 75, "b": 75}, 75),
        ({"a": 75, "b": LOST}, 75),  # rank 0 has its checkpoint, and says so
        ({"a": CRASHED, "b": 75}, 70),  # it raised while it stopped
        ({"a": 71, "b": ENDED}, 71),
        ({"a": ENDED, "b": LOST}, 70),
        ({"a": 0, "b": 0}, 0),
        ({"a": 74, "b": ENDED}, 74),
    ],
)
def test_the_code_of_a_run_that_was_asked_to_stop(
    codes: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, [])

    def stopped(job: Job, nodes: dict[str, Any], stop: Stop) -> dict[str, int]:
        os.kill(os.getpid(), signal.SIGTERM)
        return codes

    monkeypatch.setattr(supervise, "attempt", stopped)
    assert world.run() == expected


def test_a_stop_before_anything_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, [])
    connect = world._connect

    def interrupted(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        return connect(*arguments)

    monkeypatch.setattr(supervise, "connect", interrupted)
    assert world.run() == 75
    assert world.started_on == []


def test_only_a_second_ctrl_c_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed terminal tells of it twice within a millisecond, and systemd sends SIGTERM with SIGHUP."""
    now = 5.0
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: now))

    def sent(*numbers: int) -> int:
        for number in numbers:
            os.kill(os.getpid(), number)
        return stop.asked

    with Stop().on_signals() as stop:
        assert sent(signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1) == 1
        now += 10
        assert sent(signal.SIGHUP, signal.SIGUSR1) == 1
        assert sent(signal.SIGTERM) == 1, "the first of its kind"
        assert sent(signal.SIGTERM, signal.SIGINT) == 1, "at once"
        now += 1.5
        assert sent(signal.SIGHUP) == 1
        assert sent(signal.SIGINT) == 2
