"""Running a job on its nodes to the end: signals, faults, restarts, the true exit code.

launch does not go through deepspeed's own runner (pdsh): that hands overrides to a shell, returns 0 when it is killed,
and leaves the other nodes hanging when one dies. It starts an agent on each node instead (agent.py), which runs the
same node launcher as deepspeed's runner would. Agents that hear nothing more from launch end their ranks; when one node
ends with a fault, launch ends the others, and starts again on the hosts that answer from the newest checkpoint.
"""

import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from uuid import uuid4

from data_prep.errors import ExitCode, UserError
from launch.agent import CRASHED, ENDED, GRACE_SECONDS, Task
from launch.command import TRAINING_MODULE
from launch.nodes import LOST, Node, connect, is_local, tasks
from pretrain.config import accumulation_steps

_POLL_SECONDS = 0.2
_ORDERLY_SECONDS = 90.0  # for nodes to end by themselves after one that ended in an orderly way
_WINDOW_SECONDS = 3600.0  # restarts are counted in it
_FAULTS = {CRASHED, ENDED, LOST, ExitCode.STUCK}  # another start may help
_STORIES = {
    LOST: "lost",
    ExitCode.STOPPED: "stopped",
    CRASHED: "a rank died",
    ENDED: "ended",
    ExitCode.STUCK: "no progress",
}
_SHORT_SECONDS = 20.0  # a start that ends sooner doubles the pause before the next one
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 2.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run where, and how long to insist."""

    overrides: tuple[str, ...]
    hosts: Mapping[str, int | None]  # name -> processes; None, for a single host: as many as it has devices
    run_dir: str | None = None
    batch_sizes: tuple[int, int] | None = None  # global and micro, which the number of ranks must fit
    module: str = TRAINING_MODULE
    environment: Mapping[str, str]
    ssh: tuple[str, ...] = ("ssh",)
    restarts: int = 0  # at most, within an hour
    stops: bool = False  # training may stop without being asked (stop_at); else who stops is started again
    lost_after: float = 45.0  # seconds without a word after which a node, or launch, is taken for lost


def supervise(job: Job) -> int:
    """Run `job`, start it again after faults that another start may survive, and return its exit code.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks every rank to stop in an orderly way; the second kills. When this
    returns or raises, no process of the job is left on a host that answers.
    """
    mark = uuid4().hex
    faults: list[float] = []
    pause = _BACKOFF_SECONDS
    codes: dict[str, int] | None = None
    with Stop().on_signals() as stop:
        while True:
            nodes = _reach(job, mark, codes, stop)
            started = time.monotonic()
            try:
                codes = {} if stop.asked else attempt(job, nodes, stop)
            finally:
                _close(nodes.values())
            code = outcome(codes.values())
            if stop.asked:
                broken_off = ExitCode.STOPPED if stop.asked == 1 else ExitCode.FAILED
                return broken_off if code in _FAULTS else code
            if code not in _FAULTS and (code != ExitCode.STOPPED or job.stops or not job.restarts):
                return code
            now = time.monotonic()
            faults = [*(fault for fault in faults if now - fault < _WINDOW_SECONDS), now]
            story = "; ".join(
                f"{host}: {_STORIES.get(code, f'exit code {code}')}" for host, code in codes.items() if code
            )
            if len(faults) > job.restarts:
                say(f"{story}; given up after {job.restarts} restarts within an hour" if job.restarts else story)
                lost = [host for host, code in codes.items() if code == LOST]
                _close(connect(lost, mark, job.ssh, job.lost_after).values())  # its agent ends what is left there
                return code if code in (ExitCode.STUCK, ExitCode.STOPPED) else ExitCode.FAILED
            pause = min(_MAX_BACKOFF_SECONDS, 2 * pause) if now - started < _SHORT_SECONDS else _BACKOFF_SECONDS
            say(f"{story}; restart {len(faults)} of {job.restarts} in {pause:.0f} s")
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
    told, beat = 0, time.monotonic()
    first_end: float | None = None
    end_told: float | None = None
    while any(node.code is None for node in nodes.values()):
        now, order = time.monotonic(), None
        ended = {node.code for node in nodes.values() if node.code is not None}
        if ended and first_end is None:
            first_end = now
        if stop.asked > told:
            told, order = stop.asked, "stop" if stop.asked == 1 else "kill"
        elif first_end and not end_told and (ended & _FAULTS or now - first_end > _ORDERLY_SECONDS):
            end_told, order = now, "end"
        elif now - beat > job.lost_after / 6:
            order = "beat"
        if order:
            beat = now
            for node in nodes.values():
                node.tell(order)
        if end_told and now - end_told > job.lost_after:
            _close(nodes.values())
        stop.sleep(_POLL_SECONDS)
    return {host: LOST if node.code is None else node.code for host, node in nodes.items()}


def outcome(codes: Iterable[int]) -> int:
    """The run's exit code from its nodes'. What a rank says of its failure counts before how its peers then ended."""
    found = set(codes)
    for code in (ExitCode.USAGE, ExitCode.DISK, ExitCode.FAILED):
        if code in found:
            return code
    if found & _FAULTS:
        return ExitCode.STUCK if ExitCode.STUCK in found else CRASHED
    return max(found, default=ExitCode.STOPPED)


def _reach(job: Job, mark: str, before: Mapping[str, int] | None, stop: "Stop") -> dict[str, Node]:
    """Agents on the hosts to train on. At the first start, when no exit codes are from `before`, all must answer.

    A host that was lost and does not answer may still be training: it stops by itself after `lost_after` seconds, for
    which we wait, and try once more. Then as many hosts train as the global batch can be split over.
    """
    hosts = list(job.hosts)
    nodes = connect(hosts, mark, job.ssh, job.lost_after)
    missing = [host for host in hosts if host not in nodes]
    if missing and before is None:
        _close(nodes.values())
        raise UserError(f"no answer from {', '.join(missing)}; see that `ssh HOST true` works without a password")
    if any(before[host] == LOST for host in missing if before and host in before):
        _close(nodes.values())
        pause = job.lost_after + 2 * GRACE_SECONDS
        say(f"no answer from {', '.join(missing)}; whatever trains there ends within {pause:.0f} s, waiting for that")
        stop.sleep(pause)
        nodes = connect(hosts, mark, job.ssh, job.lost_after)
    if len(nodes) < len(hosts) and not stop.asked:
        chosen = most_hosts({host: job.hosts[host] or 1 for host in nodes}, job.batch_sizes)
        _close(node for host, node in nodes.items() if host not in chosen)
        nodes = {host: nodes[host] for host in chosen}
        say(f"going on without {', '.join(host for host in hosts if host not in nodes)}")
    return nodes


def most_hosts(slots: Mapping[str, int], batch_sizes: tuple[int, int] | None) -> list[str]:
    """The longest leading part of the hosts whose ranks the global batch splits over. Raises `UserError` for none."""
    hosts = list(slots)
    for count in range(len(hosts), 0, -1):
        try:
            if batch_sizes:
                accumulation_steps(*batch_sizes, sum(slots[host] for host in hosts[:count]))
        except UserError:
            continue
        return hosts[:count]
    raise UserError(
        f"{len(hosts)} hosts are left, and the global batch cannot be split over them; repair the others and "
        "run the same command again"
    )


class Stop:
    """Signals received."""

    def __init__(self) -> None:
        self.asked = 0

    @contextmanager
    def on_signals(self) -> Iterator["Stop"]:
        """Count signals inside, but those that our caller has us ignore (nohup)."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.asked += 1
        if self.asked == 1:
            say("stopping after this step, with a checkpoint; once more kills")

    def sleep(self, seconds: float) -> None:
        """Until then, or until the next signal."""
        before, end = self.asked, time.monotonic() + seconds
        while self.asked == before and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _close(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.close()
