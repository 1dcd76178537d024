"""What a run tells people, and where: JSONL, TensorBoard, sinks of one's own, the terminal; W&B is wandb_sink's.

metrics.jsonl is the source of truth; every other sink may fail without harm. Rank 0 alone writes: the other ranks hold
a `Telemetry` without sinks. Knows nothing of the training loop, and never touches a device.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cloze.errors import DiskError, UserError
from cloze.files import parsed, write_whole
from cloze.log import log
from cloze.redact import redact
from pretrain.changes import read_changes
from pretrain.config import TrainConfig, WandbMode
from pretrain.telemetry.console import Console
from pretrain.telemetry.harmless import Harmless, reason
from pretrain.telemetry.metrics_file import METRICS_NAME, ROLLED_BACK_NAME
from pretrain.telemetry.wandb_sink import WANDB_ID_NAME, RunId, WandbSink


class Sink(Protocol):
    """Somewhere metrics go. `step` never falls; an evaluation may bear the step of the training line before it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rollback(self, step: int) -> None:
        """What was logged after `step` did not count."""

    def close(self, exit_code: int) -> None: ...


class JsonlSink:
    """metrics.jsonl: one JSON object per step, `step` first, steps strictly ascending, each flushed at once.

    `time` (seconds since 1970) tells when the step was first logged. A second `log` for the newest step goes into that
    step's object. A value that is not finite is written as null: JSON has no NaN, and a reader must not lose the whole
    line for it. Opening for a resume moves what a killed run left behind, lines after `resume_step`, to the end of
    metrics.rolled-back.jsonl; without a `resume_step`, all lines: no row is ever lost.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        with _disk(self._path):
            kept = _lines_through(self._path, resume_step)
            _set_aside(self._path, kept)
            write_whole(self._path, b"".join(kept))
            self._file = self._path.open("r+b")
            self._row: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": -1}
            self._start = sum(map(len, kept[:-1]))  # of that row

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        last = self._row["step"]
        assert step >= last, f"step {step} logged after step {last}"
        values = {key: _number(value) for key, value in metrics.items() if key not in ("step", "time")}
        with _disk(self._path):
            if step > last:
                self._start = self._file.seek(0, os.SEEK_END)
                self._row = {"step": step, **values, "time": round(time.time(), 3)}
            else:
                self._row |= values
                self._file.seek(self._start)
            self._file.write((json.dumps(self._row) + "\n").encode())
            self._file.flush()
            self._file.truncate()

    def rollback(self, step: int) -> None:
        self.close(0)
        self._open(step)

    def close(self, exit_code: int) -> None:
        with _disk(self._path):
            self._file.close()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror or error}; free space and run the same command again") from error


def _number(value: float) -> float | None:
    return value if isinstance(value, int) else float(value) if math.isfinite(value) else None


def _lines_through(path: Path, resume_step: int | None) -> list[bytes]:
    """The whole, parsable lines of a metrics file up to `resume_step`, as they stand."""
    if resume_step is None or not path.exists():
        return []
    kept: list[bytes] = []
    last = -1
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = int(parsed(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
        if line.endswith(b"}\n") and last < step <= resume_step:
            kept.append(line)
            last = step
    return kept


def _set_aside(path: Path, kept: Sequence[bytes]) -> None:
    """Append the lines of a metrics file that are not among those `kept`, to the file beside it, before they go."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    remaining = {*kept}
    dropped = [line for line in lines if line.strip() and line not in remaining]
    if dropped:
        with path.with_name(ROLLED_BACK_NAME).open("ab") as file:
            file.write(b"".join(line if line.endswith(b"\n") else line + b"\n" for line in dropped))
            file.flush()
            os.fsync(file.fileno())


class TensorBoardSink:
    """TensorBoard events in `folder`; what lies after the step of a resume or a rollback is hidden."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard=true: tensorboard is not installed; pip install 'cloze[tensorboard]'"
            ) from None
        self._folder = str(folder)
        self._new: Any = SummaryWriter
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        self._writer: Any = self._new(self._folder, purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def rollback(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class HarmlessSink:
    """A sink whose first fault, be it in its making, costs one warning and ends it, never the run."""

    def __init__(self, name: str, make: Callable[[], Sink], kept: str = f"{METRICS_NAME} has everything") -> None:
        """`kept` says what is not lost without it. Raises `UserError` where `make` does."""
        self._name, self._kept = name, kept
        self._sink: Sink | None = None
        with Harmless(self._fail):
            self._sink = make()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with Harmless(self._fail):
            if self._sink:
                self._sink.log(step, metrics)

    def rollback(self, step: int) -> None:
        with Harmless(self._fail):
            if self._sink:
                self._sink.rollback(step)

    def close(self, exit_code: int) -> None:
        with Harmless(self._fail):
            if self._sink:
                self._sink.close(exit_code)

    def _fail(self, error: BaseException) -> None:
        self._sink = None
        log.info(f"{self._name}: off for this run: {reason(error)}; {self._kept}")


def sink_of_your_own(name: str) -> Callable[[Path, int | None, Mapping[str, Any]], Sink]:
    """The factory `module:factory`: (run directory, step to resume from or None, configuration) -> sink.

    Raises `UserError` where there is none.
    """
    module, _, factory = name.partition(":")
    try:
        found: Callable[[Path, int | None, Mapping[str, Any]], Sink] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"log.sinks=[{name}]: {error}; name it as module:factory, on PYTHONPATH") from error
    return found


class Telemetry:
    """All sinks and the terminal behind one `log`."""

    def __init__(self, sinks: Sequence[Sink], console: Console | None, wandb_id: str | None = None) -> None:
        self._sinks, self._console = tuple(sinks), console
        self.wandb_id = wandb_id  # goes into checkpoints: a run directory may be lost

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of optimizer step `step`. The same step may come twice: training first, then its evaluation."""
        for sink in self._sinks:
            sink.log(step, metrics)
        if self._console is not None:
            self._console.log(step, metrics)

    def rollback(self, step: int) -> None:
        """The run goes back to `step`."""
        for sink in self._sinks:
            sink.rollback(step)

    def close(self, exit_code: int) -> None:
        if self._console is not None:
            self._console.close()
        for sink in self._sinks:
            sink.close(exit_code)


def open_telemetry(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume_step: int | None,
    wandb_id: str | None,
    resolved: Mapping[str, Any],
    seconds: float = 0.0,
) -> Telemetry:
    """The telemetry that `config` asks for of a run that has trained for `seconds`.

    `wandb_id` is a checkpoint's; `resolved` the whole configuration as data.

    Raises `UserError` when TensorBoard is asked for and not there, `DiskError` when metrics.jsonl cannot be written.
    """
    metrics = run_dir / METRICS_NAME
    sinks: list[Sink] = [JsonlSink(metrics, resume_step)]
    if stretches := read_changes(run_dir):  # what its starts did otherwise, beside what it does now
        resolved = {**resolved, "stretches": stretches}
    if config.log.tensorboard:
        sinks.append(HarmlessSink("TensorBoard", lambda: TensorBoardSink(run_dir / "tensorboard", resume_step)))
    own = {name: partial(sink_of_your_own(name), run_dir, resume_step, redact(resolved)) for name in config.log.sinks}
    sinks += [HarmlessSink(name, make) for name, make in own.items()]
    run_id: RunId | None = None
    if config.wandb.mode is not WandbMode.disabled:
        with _disk(run_dir / WANDB_ID_NAME):
            run_id = RunId(run_dir, wandb_id)
        history = (json.loads(line) for line in _lines_through(metrics, resume_step))
        make_wandb = partial(WandbSink, config, run_dir, run_id, resolved, history)
        sinks.append(HarmlessSink("W&B", make_wandb))
    seconds_left = math.inf if config.budget.hours is None else 3600 * config.budget.hours - seconds
    console = Console(config.steps, resume_step or 0, seconds_left=seconds_left)
    return Telemetry(sinks, console, run_id.value if run_id else wandb_id)
