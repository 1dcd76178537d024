"""Where a run stands, from its directory alone: its state, what its losses say, the time that remains, what to do now.

Cheap enough for a thousand runs: small files and the end of metrics.jsonl. Reads; writes nothing.
"""

import fcntl
import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cloze.errors import ExitCode
from cloze.files import json_object
from pretrain.evaluate.baseline import Baseline
from pretrain.evaluate.plateau import Verdict, evaluations_of, judge
from pretrain.telemetry.metrics_file import METRICS_NAME, Row, is_number, newest_rows

_ALIVE_SECONDS = 120.0  # since the last row: a run whose lock is on another machine
_STATES = {  # of learning, for people
    "plateau": "on the plateau",
    "left": "off the plateau",
    "diverged": "diverged",
    "trapped": "trapped",
    "slow": "slow",
    "easy": "too good to be true",
    "unlike": "far better in training",
}
_PAUSE = 20.0  # times the usual gap between rows: the run stood still

_ENDS = {
    ExitCode.OK: "finished",
    ExitCode.STOPPED: "stopped",
    ExitCode.FAILED: "failed",
    ExitCode.STUCK: "stuck",
    ExitCode.DISK: "out of disk",
    ExitCode.USAGE: "refused",
}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One run, now."""

    name: str
    directory: Path
    state: str  # running, finished, stopped, failed, stuck, out of disk, refused, killed or not begun
    learning: str  # one of _STATES, or nothing where nothing is known
    step: int
    steps: int | None
    tokens: int | None
    loss: float | None  # of training, nats
    held_out: float | None  # masked-LM loss on held-out text, nats per masked token
    frequencies: float | None  # what word frequencies alone give there
    tokens_per_second: float | None
    remaining_seconds: float | None  # of a run that goes on
    seen: float  # the last sign of life, seconds since 1970; 0 where there is none
    advice: str  # what a person should do now
    command: str | None  # that helps with it, as a shell takes it

    @property
    def line(self) -> str:
        """`running, on the plateau`."""
        return ", ".join(filter(None, (self.state, self.learning)))

    @property
    def share(self) -> float | None:
        """Of the steps, done."""
        return min(1.0, self.step / self.steps) if self.steps else None


def standing_of(directory: Path, rows: Sequence[Row] | None = None, now: float | None = None) -> Standing:
    """Where the run in `directory` stands; `rows` are its newest metrics, where they are at hand."""
    rows = newest_rows(directory / METRICS_NAME) if rows is None else rows
    now = time.time() if now is None else now
    config, status = _text(directory / "config.yaml"), json_object(directory / "status.json")
    environment = json_object(directory / "environment.json")
    last = rows[-1] if rows else {}
    evaluation = next((row for row in reversed(rows) if "eval/mlm_loss" in row), {})
    seen = max(
        _changed(directory / METRICS_NAME), _changed(directory / "environment.json"), _number(status.get("time")) or 0
    )
    state = _state(directory, status, environment, now - seen if seen else math.inf)
    verdict = _verdict(rows, state, status)
    found = re.search(r"^steps: ([0-9]{1,15})$", config, re.MULTILINE)
    steps = int(found[1]) if found else None
    speeds = [speed for row in rows[-32:] if (speed := _number(row.get("throughput/tokens_per_second")))]
    going = state == "running"
    advice, command = _advice(directory, state, verdict, environment, status)
    return Standing(
        name=directory.name,
        directory=directory,
        state=state,
        learning=_learning(verdict, last),
        step=_whole(last.get("step", status.get("step"))) or 0,
        steps=steps,
        tokens=_whole(last.get("tokens")),
        loss=_latest(rows, "train/loss"),
        held_out=_number(evaluation.get("eval/mlm_loss")),
        frequencies=_number(evaluation.get("eval/frequencies_loss")),
        tokens_per_second=median(speeds) if speeds else None,
        remaining_seconds=_remaining(rows, steps, config, now) if going else None,
        seen=float(seen),
        advice=advice,
        command=command,
    )


def run_directories(root: Path) -> list[Path]:
    """The runs below a directory: those of a sweep lie one deeper."""
    found = []
    for pattern in ("*", "*/*"):
        found += [path.parent for path in root.glob(f"{pattern}/config.yaml") if _is_run(path.parent)]
    return sorted({*found}, key=lambda path: str(path))


def stretches(rows: Sequence[Row]) -> list[int]:
    """Indices of rows before which the run stood still: it was resumed there."""
    times = [row.get("time") for row in rows]
    gaps = [(b - a) if a and b else 0.0 for a, b in pairwise(times)]
    usual = median(gaps) if gaps else 0.0
    return [number + 1 for number, gap in enumerate(gaps) if gap > max(60.0, _PAUSE * usual)]


def _is_run(path: Path) -> bool:
    return (path / METRICS_NAME).exists() or (path / "status.json").exists() or (path / ".lock").exists()


def _state(directory: Path, status: Mapping[str, Any], environment: Mapping[str, Any], silent_seconds: float) -> str:
    held = _is_held(directory / ".lock")
    if held:
        return "running"
    ended, started = status.get("time"), _started(environment)
    of_this_start = "started" in status and status["started"] == environment.get("started")  # whatever its clock says
    if of_this_start or (isinstance(ended, int | float) and (started is None or ended >= started - 1)):
        code = status.get("exit_code")
        known = {int(each): told for each, told in _ENDS.items()}
        return known.get(code, f"ended with exit code {code}") if isinstance(code, int) else "ended"
    if started is None and not (directory / METRICS_NAME).exists():
        return "not begun"
    return "running" if silent_seconds < _ALIVE_SECONDS else "killed"


def _is_held(path: Path) -> bool:
    """Whether a process of this machine, or of one that shares its locks, trains there."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _started(environment: Mapping[str, Any]) -> float | None:
    with suppress(ValueError, TypeError):
        return datetime.strptime(environment.get("started", ""), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    return None


def _verdict(rows: Sequence[Row], state: str, status: Mapping[str, Any]) -> Verdict | None:
    evaluation: Row = next((row for row in reversed(rows) if "eval/mlm_loss" in row), {})
    baseline, found = _number(evaluation.get("eval/frequencies_loss")), None
    if baseline is not None:
        found = judge(evaluations_of(rows), Baseline(baseline, 0.0, 0.0))
        left = _number(evaluation.get("eval/left_plateau_tokens"))
        if found and found.state == "left" and left is not None:
            found = found._replace(left_at_tokens=int(left))
    told = status.get("verdict")
    if isinstance(told, str) and state != "running":
        return Verdict("diverged", None, told)
    return found


def _learning(verdict: Verdict | None, last: Row) -> str:
    if last.get("train/loss", 0.0) is None:  # not finite
        return "diverged"
    return _STATES.get(verdict.state if verdict else "", "")


def _advice(
    directory: Path,
    state: str,
    verdict: Verdict | None,
    environment: Mapping[str, Any],
    status: Mapping[str, Any],
) -> tuple[str, str | None]:
    """What to do, and a command for it."""
    again, run = _again(environment), shlex.quote(str(directory))
    out = shlex.quote(f"out/{directory.name}")
    trouble = verdict.line if verdict and verdict.is_trouble else ""
    if state == "running":
        return trouble or "nothing: it trains", f"python -m pretrain.runs follow {run}"
    if state == "finished" and trouble:
        return trouble, None
    if state == "finished" and verdict and verdict.state == "early":
        return f"train longer, with more steps: {verdict.line}", again
    if state == "finished":
        return "export the model, then score or fine-tune it", f"python -m pretrain.export {run} {out}"
    if state == "stopped":
        return trouble or "it stands at a checkpoint: the same command goes on", again
    if state == "killed":
        return "it ended without a word (killed, or the machine went down): the same command goes on", again
    told = {
        "failed": "lower optim.lr or lengthen the warm-up; the same command goes on from the last checkpoint",
        "stuck": "a rank hung: stacks-rank*.txt tell where; then the same command goes on",
        "out of disk": "free space; then the same command goes on",
        "refused": "its last start was refused: the line on the terminal says why; correct the command",
        "not begun": "start it",
    }
    return trouble or told.get(state, "the last lines on the terminal say why"), again


def _again(environment: Mapping[str, Any]) -> str | None:
    """The command that the run was started with, as far as it was written down."""
    words = environment.get("overrides")
    if not isinstance(words, list) or any("[redacted]" in str(word) for word in words):
        return None
    program = "python -m pretrain.train" if environment.get("world_size") == 1 else "python -m launch"
    return shlex.join([*program.split(), *map(str, words)])


def _remaining(rows: Sequence[Row], steps: int | None, config: str, now: float) -> float | None:
    """By the newest rows, pauses left out; a time budget ends a run earlier."""
    recent = [row for row in rows[-64:] if isinstance(row.get("time"), int | float)]
    if len(recent) < 2 or not steps:
        return None
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(recent) if b["step"] > a["step"]]
    if not paces:
        return None
    pace, last = median(paces), recent[-1]
    left = max(0.0, (steps - last["step"]) * pace - min(max(0.0, now - last["time"]), 60.0))
    if budget := re.search(r"^budget:\n  hours: ([0-9]+(?:\.[0-9]+)?)$", config, re.MULTILINE):
        left = min(left, max(0.0, float(budget[1]) * 3600 - last["step"] * pace))
    return float(left)


def _latest(rows: Sequence[Row], name: str) -> float | None:
    return next((_number(row[name]) for row in reversed(rows) if name in row), None)


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if is_number(value) else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
