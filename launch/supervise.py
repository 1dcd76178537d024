"""Running a job on its nodes to the end: signals, faults, restarts, the true exit code.

launch does not go through deepspeed's own runner (pdsh): that hands overrides to a shell, returns 0 when it is killed,
and leaves the other nodes hanging when one dies. It starts an agent on each node instead (agent.py), which runs the
same node launcher as deepspeed's runner would. Agents that hear nothing more from launch end their ranks; when one node
ends with a fault, launch ends the others, and starts again on the hosts that answer from the newest checkpoint.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple
from uuid import uuid4

from cloze.errors import ExitCode, UserError
from cloze.log import log
from cloze.signals import noted
from launch.agent import CRASHED, ENDED, GRACE_SECONDS, Task
from launch.job import Job
from launch.nodes import LOST, Node, connect, is_local, tasks

_POLL_SECONDS = 0.2
_ORDERLY_SECONDS = 90.0  # for nodes to end by themselves after one that ended in an orderly way
_WINDOW_SECONDS = 3600.0  # restarts are counted in it, and hosts that do not answer are waited for
_SHORT_SECONDS = 20.0  # a start that ends sooner doubles the pause before the next one
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 2.0, 60.0
_AGAIN_SECONDS = 1.0  # signals that come closer together are one: a shell and the terminal both tell of a hang-up


class End(NamedTuple):
    """What a node's exit code means."""

    story: str
    code: ExitCode  # the run's own
    again: bool  # another start may help


# The gravest first: what a rank says of its failure counts before how its peers then ended.
ENDS: dict[int, End] = {
    ExitCode.USAGE: End("bad configuration or input", ExitCode.USAGE, again=False),
    ExitCode.DISK: End("a disk is full or failing", ExitCode.DISK, again=False),
    ExitCode.FAILED: End("training failed", ExitCode.FAILED, again=False),
    ExitCode.STUCK: End("no progress, or a rank died", ExitCode.STUCK, again=True),
    LOST: End("lost", ExitCode.FAILED, again=True),
    CRASHED: End("a rank died", ExitCode.FAILED, again=True),
    ENDED: End("ended", ExitCode.FAILED, again=True),
    ExitCode.STOPPED: End("stopped", ExitCode.STOPPED, again=True),  # by somebody else, where launch did not ask
    ExitCode.OK: End("finished", ExitCode.OK, again=False),
}


def supervise(job: Job) -> ExitCode:
    """Run `job`, start it again after faults that another start may survive, and return its exit code.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks every rank to stop in an orderly way; a second SIGINT or SIGTERM
    kills. When this returns or raises, no process of the job is left on a host that answers.
    """
    job_id = uuid4().hex
    faults: list[float] = []
    pause = _BACKOFF_SECONDS
    codes: dict[str, int] | None = None
    with Stop().on_signals() as stop:
        while True:
            nodes = _connect_all(job, job_id, codes, stop)
            started = time.monotonic()
            try:
                codes = attempt(job, nodes, stop) if nodes and not stop.asked else {}
            finally:
                _close(nodes.values())
            end = outcome(codes.values())
            if stop.asked:  # rank 0's node knows whether it did, with a checkpoint; else nothing had been started
                first = next(iter(codes.values()), ExitCode.STOPPED)
                return _end(first).code if first in (ExitCode.OK, ExitCode.STOPPED) else end.code
            if not end.again or (end.code == ExitCode.STOPPED and (job.stops or not job.restarts)):
                return end.code
            now = time.monotonic()
            faults = [*(fault for fault in faults if now - fault < _WINDOW_SECONDS), now]
            story = (
                "; ".join(f"{host}: {_end(code).story}" for host, code in codes.items() if code)
                or "too few hosts answer"
            )
            if len(faults) > job.restarts or not codes:
                story += f"; given up after {len(faults) - 1} restarts within an hour" if job.restarts else ""
                log.info(f"launch: {story}")
                lost = [host for host, code in codes.items() if code == LOST]
                _close(connect(lost, job_id, job.ssh, job.lost_after).values())  # its agent ends what is left there
                job.alert(story)
                return end.code
            pause = min(_MAX_BACKOFF_SECONDS, 2 * pause) if now - started < _SHORT_SECONDS else _BACKOFF_SECONDS
            log.info(f"launch: {story}; restart {len(faults)} of {job.restarts} in {pause:.0f} s")
            stop.sleep(pause)


def attempt(job: Job, nodes: Mapping[str, Node], stop: "Stop") -> dict[str, int]:
    """Start the job once on `nodes` and wait for its end everywhere; agents' exit codes by host."""
    common = Task(
        overrides=list(job.overrides),
        hosts={host: job.hosts[host] for host in nodes},
        run_dir=job.run_dir,
        module=job.module,
        environment=dict(job.environment),
        lost_after=job.lost_after if len(nodes) > 1 or not is_local(*nodes) else 0.0,
    )
    for host, task in tasks(nodes, common).items():
        nodes[host].start(task)
    num_signals, last_sent = 0, time.monotonic()
    first_end: float | None = None
    end_requested: float | None = None
    while any(node.code is None for node in nodes.values()):
        now, request = time.monotonic(), None
        ended = [_end(node.code) for node in nodes.values() if node.code is not None]
        if ended and first_end is None:
            first_end = now
        broken = any(end.again and end.code != ExitCode.STOPPED for end in ended)
        if stop.asked > num_signals:
            num_signals, request = stop.asked, "stop" if stop.asked == 1 else "kill"
        elif first_end and not end_requested and (broken or now - first_end > _ORDERLY_SECONDS):
            end_requested, request = now, "end"
        elif now - last_sent > job.lost_after / 6:
            request = "heartbeat"
        if request:
            last_sent = now
            for node in nodes.values():
                node.send(request)
        if end_requested and now - end_requested > job.lost_after:
            _close(nodes.values())
        stop.sleep(_POLL_SECONDS)
    return {host: LOST if node.code is None else node.code for host, node in nodes.items()}


def outcome(codes: Iterable[int]) -> End:
    """The run's end from its nodes' exit codes: the gravest of them. Without any, no node could be reached."""
    found = {code if code in ENDS else CRASHED for code in codes} or {LOST}
    return next(end for code, end in ENDS.items() if code in found)


def _end(code: int) -> End:
    return outcome([code])


def _connect_all(job: Job, job_id: str, before: Mapping[str, int] | None, stop: "Stop") -> dict[str, Node]:
    """Agents on the hosts to train on. At the first start, when no exit codes are from `before`, all must answer.

    A host that was lost and does not answer may still be training: it stops by itself after `lost_after` seconds, for
    which we wait, and try once more. Then as many hosts train as the global batch can be split over. While there are
    none, we try again, for an hour: a switch that starts anew takes all of them away. Then the result is empty.
    """
    hosts = list(job.hosts)
    deadline = time.monotonic() + _WINDOW_SECONDS
    may_train = job.lost_after + 2 * GRACE_SECONDS  # seconds, where a host was lost
    while True:
        nodes = connect(hosts, job_id, job.ssh, job.lost_after)
        missing = [host for host in hosts if host not in nodes]
        if not missing or stop.asked:
            return nodes
        names = ", ".join(missing)
        if before is None:
            _close(nodes.values())
            raise UserError(f"no answer from {names}; see that `ssh HOST true` works without a password")
        if may_train and any(before.get(host) == LOST for host in missing):
            pause, reason = may_train, f"whatever trains there ends within {may_train:.0f} s, waiting for that"
        elif chosen := most_hosts({host: job.hosts[host] or 1 for host in nodes}, job.fits):
            _close(node for host, node in nodes.items() if host not in chosen)
            log.info(f"launch: going on without {', '.join(host for host in hosts if host not in chosen)}")
            return {host: nodes[host] for host in chosen}
        else:
            pause = _MAX_BACKOFF_SECONDS
            reason = f"the global batch cannot be split over the others; trying again in {pause:.0f} s"
        _close(nodes.values())
        if time.monotonic() > deadline:
            return {}
        log.info(f"launch: no answer from {names}; {reason}")
        stop.sleep(pause)
        may_train = 0.0


def most_hosts(slots: Mapping[str, int], fits: Callable[[int], bool]) -> list[str]:
    """The longest leading part of the hosts over whose ranks the run `fits`; [] for none."""
    hosts = list(slots)
    counts = range(len(hosts), 0, -1)
    return hosts[: next((count for count in counts if fits(sum(slots[host] for host in hosts[:count]))), 0)]


class Stop:
    """Signals received."""

    def __init__(self) -> None:
        self.asked = 0  # 1: to stop in an orderly way, 2: at once
        self._interrupted: float | None = None  # when the first of those signals came that kill when repeated
        self._said = False

    @contextmanager
    def on_signals(self) -> Iterator["Stop"]:
        """Note signals inside, but those that our caller has us ignore (nohup)."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        with noted(numbers, self._note):
            yield self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = max(self.asked, 1)
        if number in (signal.SIGINT, signal.SIGTERM):  # the others come as often as they like
            self._interrupted = self._interrupted or time.monotonic()
            if time.monotonic() - self._interrupted >= _AGAIN_SECONDS:
                self.asked = 2

    def sleep(self, seconds: float) -> None:
        """Until then, or until there is more to do."""
        before, end = self.asked, time.monotonic() + seconds
        while self.asked == before and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))
        if self.asked and not self._said:
            self._said = True
            log.info("launch: stopping after this step, with a checkpoint; another Ctrl-C kills")


def _close(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.close()
