"""What a run tells people, and where: JSONL, W&B, TensorBoard, the terminal.

metrics.jsonl is the source of truth; every other sink may fail without harm. Rank 0 alone writes: the other ranks hold
a `Telemetry` without sinks. Knows nothing of the training loop, and never touches a device.
"""

import importlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cloze.errors import ORDERLY_ENDS, DiskError, ExitCode, UserError, first_line
from cloze.files import write_whole
from cloze.log import log
from pretrain.changes import read_changes
from pretrain.config import TrainConfig, WandbConfig, WandbMode
from pretrain.telemetry.console import Console
from pretrain.telemetry.metrics_file import METRICS_NAME, ROLLED_BACK_NAME
from pretrain.telemetry.redact import redact, redact_overrides, redact_text

WANDB_ID_NAME = "wandb_id"
AXES = ("samples", "tokens")  # what has been trained on, in every row: to draw other metrics over instead of steps

_WANDB_INIT_SECONDS = 30.0  # then the run goes on offline
_WANDB_FINISH_SECONDS = 120.0  # then what is not uploaded stays on disk for `wandb sync`
_WANDB_ARTIFACT_SECONDS = 1800.0  # the same with a checkpoint to send


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
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
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


class Tracked(Protocol):
    """What W&B has to know of a configuration."""

    @property
    def run(self) -> str: ...

    @property
    def wandb(self) -> WandbConfig: ...


class WandbSink:
    """Weights & Biases; whatever goes wrong in it or on its network is raised.

    The step is sent as a metric of that name, with every other one drawn over it: W&B refuses its own step to fall,
    which a resume from a checkpoint needs. Offline segments of one run do not join: each starts with the rows of the
    `history` before it, so that the newest one is the whole run.
    """

    def __init__(
        self,
        config: Tracked,
        run_dir: Path,
        run_id: str,
        resolved: Mapping[str, Any],
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._run: Any = None
        self._run_dir, self._artifact = run_dir, config.wandb.artifact
        self._evaluation: dict[str, Any] = {}  # the newest
        mode = _wandb_mode(config)
        if mode == "disabled":
            return
        if mode == "online":
            with _Harmless(lambda error: log.info(f"W&B: not reached ({_reason(error)}); the run is kept on disk")):
                self._run = _wandb_run("online", config, run_dir, run_id, resolved)
                log.info(f"W&B: {self._run.url}")
            if self._run is None:
                _wandb().teardown()  # frees the run id that the failed attempt holds
                mode = "offline"
        self._offline = mode == "offline"
        if self._offline:
            self._run = _wandb_run("offline", config, run_dir, run_id, resolved)
            self._log_sync_command()  # a run that is killed says nothing at its end
        for axis in ("step", *AXES):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")
        for row in history if self._offline else ():
            self._run.log({key: value for key, value in row.items() if value is not None and key != "time"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is None:
            return
        self._run.log({**metrics, "step": step})
        if evaluation := {key: value for key, value in metrics.items() if key.startswith("eval/")}:
            same = self._evaluation if self._evaluation.get("step") == step else {}  # of one step there may be two
            axes = {key: metrics[key] for key in AXES if key in metrics}
            self._evaluation = {**same, "step": step, **axes, **evaluation}

    def rollback(self, step: int) -> None:
        """Nothing: our own step axis may fall."""

    def close(self, exit_code: int) -> None:
        if self._run is None:
            return
        if exit_code not in ORDERLY_ENDS:
            _alert(self._run, self._run_dir, f"exit code {exit_code}, see {self._run_dir}")
        if self._evaluation:
            rows = [[key, float(value)] for key, value in self._evaluation.items()]
            table = _wandb().Table(columns=["metric", "value"], data=rows)
            self._run.log({"step": self._evaluation["step"], "final_evaluation": table})
        latest = self._run_dir / "checkpoints" / "LATEST"
        if self._artifact and latest.exists():
            checkpoint = latest.parent / latest.read_text().strip()
            self._run.log_artifact(str(checkpoint), name=f"{self._run_dir.name}-checkpoint", type="checkpoint")
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self._log_sync_command()
        else:
            if self._offline:
                self._log_sync_command()

    def _log_sync_command(self) -> None:
        log.info(f"W&B: send this run with  wandb sync {Path(self._run.dir).parent}")


def raise_alert(config: Tracked, run_dir: Path, story: str) -> None:
    """Alert of a run that ended while nobody in it could: rank 0 was killed, or hung. Never raises.

    Nothing where W&B is not reached: an alert that waits on a disk warns nobody.
    """
    with _Harmless(lambda error: log.info(f"W&B: no alert was sent ({_reason(error)})")):
        path = run_dir / WANDB_ID_NAME
        if config.wandb.mode is not WandbMode.disabled and path.exists() and _wandb_mode(config) == "online":
            run = _wandb_run("online", config, run_dir, path.read_text(encoding="utf-8").strip(), {})
            _alert(run, run_dir, story)
            run.finish(exit_code=ExitCode.FAILED)


def _wandb() -> Any:
    try:
        import wandb  # an optional extra, and seconds to import
    except ImportError:
        raise RuntimeError("not installed (pip install 'cloze[wandb]')") from None
    return wandb


def _wandb_mode(config: Tracked) -> str:
    """online, offline or disabled."""
    wandb, mode = _wandb(), config.wandb.mode
    wanted = os.environ.get("WANDB_MODE") if mode is WandbMode.auto else mode.value
    if wanted in ("disabled", "offline"):
        return wanted
    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online"
    log.info("W&B: no API key, so the run is kept on disk (`wandb login` first sends it online)")
    return "offline"


def _wandb_run(mode: str, config: Tracked, run_dir: Path, run_id: str, resolved: Mapping[str, Any]) -> Any:
    wandb = _wandb()
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=_WANDB_INIT_SECONDS,
        finish_timeout=_WANDB_ARTIFACT_SECONDS if config.wandb.artifact else _WANDB_FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    with _redacted_argv():
        return wandb.init(
            mode=mode,
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.run,
            tags=list(config.wandb.tags) or None,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=redact(resolved),
            settings=settings,
        )


def _alert(run: Any, run_dir: Path, text: str) -> None:
    run.alert(title=f"{run_dir.name} failed", text=text)


class _Harmless:
    """Hands any `Exception` raised inside to `on_error` and swallows it: for third-party sinks, which must not stop us.

    They raise classes that no public base unites. Ctrl-C and exits pass through, and what the user can mend.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or (isinstance(error, UserError) and not isinstance(error, DiskError)):
            return False
        self._on_error(error)
        return True


def _reason(error: BaseException) -> str:
    return redact_text(first_line(error))


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """W&B stores the command line in plain text."""
    original = sys.argv
    sys.argv = [original[0], *redact_overrides(original[1:])]
    try:
        yield
    finally:
        sys.argv = original


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
        with _Harmless(self._fail):
            self._sink = make()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with _Harmless(self._fail):
            if self._sink:
                self._sink.log(step, metrics)

    def rollback(self, step: int) -> None:
        with _Harmless(self._fail):
            if self._sink:
                self._sink.rollback(step)

    def close(self, exit_code: int) -> None:
        with _Harmless(self._fail):
            if self._sink:
                self._sink.close(exit_code)

    def _fail(self, error: BaseException) -> None:
        self._sink = None
        log.info(f"{self._name}: off for this run: {_reason(error)}; {self._kept}")


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
    if config.wandb.mode is not WandbMode.disabled:
        run_id = wandb_id = _wandb_id(run_dir, wandb_id)
        history = (json.loads(line) for line in _lines_through(metrics, resume_step))
        sinks.append(HarmlessSink("W&B", lambda: WandbSink(config, run_dir, run_id, resolved, history)))
    seconds_left = math.inf if config.budget.hours is None else 3600 * config.budget.hours - seconds
    return Telemetry(sinks, Console(config.steps, resume_step or 0, seconds_left=seconds_left), wandb_id)


def _wandb_id(run_dir: Path, from_checkpoint: str | None) -> str:
    """The run's W&B id: the checkpoint's, else the run directory's, else a new one; kept in the run directory."""
    path = run_dir / WANDB_ID_NAME
    with _disk(path):
        kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        run_id = from_checkpoint or kept or secrets.token_hex(4)
        if run_id != kept:
            write_whole(path, f"{run_id}\n".encode())
    return run_id
