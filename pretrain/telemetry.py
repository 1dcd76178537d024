"""What a run tells people, and where: JSONL, W&B, TensorBoard, the terminal.

metrics.jsonl is the source of truth; every other sink may fail without harm. Rank 0 alone writes: the other ranks hold
a `Telemetry` without sinks. Knows nothing of the training loop, and never touches a device.
"""

import importlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from data_prep.errors import DiskError, ExitCode, UserError
from pretrain.config import TrainConfig, WandbMode

REDACTED = "[redacted]"
METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id"

_WANDB_INIT_SECONDS = 30.0  # then the run goes on offline
_WANDB_FINISH_SECONDS = 120.0  # then what is not uploaded stays on disk for `wandb sync`

_SECRET_ANYWHERE = frozenset(
    {"secret", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "apikey"}
)
_SECRET_LAST = frozenset({"key", "keys", "token", "auth", "authorization", "bearer", "cookie", "dsn"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@]*:[^\s@]*|[^\s/@]+)@")
_URL_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:key|token|secret|sig|signature|password|credential)=)[^&\s]+")


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy without secrets: values under keys that name one, and credentials inside URLs."""
    return {
        key: REDACTED if value is not None and _names_a_secret(str(key)) else _redact_value(value)
        for key, value in mapping.items()
    }


def redact_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line overrides without secrets: `store.api_key=x` becomes `store.api_key=[redacted]`."""
    redacted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        redacted.append(
            f"{key}={REDACTED}" if equals and _names_a_secret(key) else redact_text(f"{key}{equals}{value}")
        )
    return redacted


def redact_text(text: str) -> str:
    """`text` with the credentials of any URL in it replaced."""
    return _URL_QUERY.sub(rf"\1{REDACTED}", _URL_USER.sub(rf"\1{REDACTED}@", text))


def _redact_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact_value(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _names_a_secret(key: str) -> bool:
    words = [word.lower() for word in _WORD.findall(key)]
    return bool(_SECRET_ANYWHERE & set(words)) or (bool(words) and words[-1] in _SECRET_LAST)


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
    line for it. Opening for a resume drops what a killed run left behind: lines after `resume_step` and a torn last
    line. Without a `resume_step` the file starts anew.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        path = self._path
        with _disk(path):
            kept = _lines_through(path, resume_step)
            self._last_step = int(json.loads(kept[-1])["step"]) if kept else -1
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._file = path.open("r+b")
            self._file.seek(0, os.SEEK_END)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step >= self._last_step, f"step {step} logged after step {self._last_step}"
        values = {key: _number(value) for key, value in metrics.items() if key not in ("step", "time")}
        with _disk(self._path):
            if step == self._last_step and values:
                self._file.seek(-len("}\n"), os.SEEK_END)
                self._file.write((", " + json.dumps(values)[1:] + "\n").encode())
            elif step > self._last_step:
                self._file.write((json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n").encode())
            self._file.flush()
        self._last_step = step

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


class WandbSink:
    """Weights & Biases. Whatever goes wrong in it or on its network costs one warning, never the run.

    The step is sent as a metric of that name, with every other one drawn over it: W&B refuses its own step to fall,
    which a resume from a checkpoint needs.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str, resolved: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._offline = False
        self._run_dir, self._artifact = run_dir, config.wandb.artifact
        with _Harmless(self._fail):
            self._open(config, run_dir, run_id, resolved)

    def _open(self, config: TrainConfig, run_dir: Path, run_id: str, resolved: Mapping[str, Any]) -> None:
        import wandb  # an optional extra, and seconds to import

        mode = config.wandb.mode
        wanted = os.environ.get("WANDB_MODE") if mode is WandbMode.auto else mode.value
        if wanted == "disabled":
            return
        self._offline = wanted == "offline"
        wandb.setup(wandb.Settings(silent=True))
        if not self._offline and not wandb.login(prompt=False, verify=False):
            _say("W&B: no API key, so the run is kept on disk (`wandb login` first sends it online)")
            self._offline = True
        arguments = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "name": config.run,
            "tags": list(config.wandb.tags) or None,
            "id": run_id,
            "resume": "allow",
            "dir": str(run_dir),
            "config": redact(resolved),
            "settings": wandb.Settings(
                silent=True, console="off", init_timeout=_WANDB_INIT_SECONDS, finish_timeout=_WANDB_FINISH_SECONDS
            ),
        }
        with _redacted_argv():
            if not self._offline:
                with _Harmless(lambda error: _say(f"W&B: not reached ({_first_line(error)}); the run is kept on disk")):
                    self._run = wandb.init(mode="online", **arguments)
                    _say(f"W&B: {self._run.url}")
            if self._run is None:
                if not self._offline:
                    wandb.teardown()  # frees the run id that the failed attempt holds
                self._offline = True
                self._run = wandb.init(mode="offline", **arguments)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            with _Harmless(self._fail):
                self._run.log({**metrics, "step": step})

    def rollback(self, step: int) -> None:
        """Nothing: our own step axis may fall."""

    def close(self, exit_code: int) -> None:
        if self._run is None:
            return
        with _Harmless(self._fail):
            folder = Path(self._run.dir).parent
            if exit_code not in (ExitCode.OK, ExitCode.STOPPED):
                self._run.alert(
                    title=f"{self._run_dir.name} failed", text=f"exit code {exit_code}, see {self._run_dir}"
                )
            latest = self._run_dir / "checkpoints" / "LATEST"
            if self._artifact and latest.exists():
                checkpoint = latest.parent / latest.read_text().strip()
                self._run.log_artifact(str(checkpoint), name=f"{self._run_dir.name}-checkpoint", type="checkpoint")
            self._run.finish(exit_code=exit_code)
            if self._offline:
                _say(f"W&B: send this run with  wandb sync {folder}")

    def _fail(self, error: BaseException) -> None:
        self._run = None
        reason = "not installed (pip install 'cloze[wandb]')" if isinstance(error, ImportError) else _first_line(error)
        _say(f"W&B: off for this run: {reason}; metrics.jsonl has everything")


class _Harmless:
    """Hands any `Exception` raised inside to `on_error` and swallows it: for third-party sinks, which must not stop us.

    They raise classes that no public base unites. Ctrl-C and exits pass through.
    """

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._on_error(error)
        return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return redact_text(lines[0]) if lines else type(error).__name__


@contextmanager
def _redacted_argv() -> Iterator[None]:
    """W&B stores the command line in plain text."""
    original = sys.argv
    sys.argv = [original[0], *redact_overrides(original[1:])]
    try:
        yield
    finally:
        sys.argv = original


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class TensorBoardSink:
    """TensorBoard events in `folder`; a resume hides what lies after its step."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log.tensorboard=true: tensorboard is not installed; pip install 'cloze[tensorboard]'"
            ) from None
        with _disk(folder):
            self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def rollback(self, step: int) -> None:
        """Nothing: TensorBoard draws both stretches."""

    def close(self, exit_code: int) -> None:
        self._writer.close()


class HarmlessSink:
    """A sink whose first fault costs one warning and ends it, never the run."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name = name
        self._sink: Sink | None = sink

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
        _say(f"{self._name}: off for this run: {_first_line(error)}; metrics.jsonl has everything")


def sink_of_your_own(name: str, run_dir: Path, resume_step: int | None, resolved: Mapping[str, Any]) -> Sink:
    """What `module:factory` makes of (run directory, step to resume from or None, configuration without secrets).

    Raises `UserError` where there is no such factory.
    """
    module, _, factory = name.partition(":")
    try:
        make: Callable[[Path, int | None, Mapping[str, Any]], Sink] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"log.sinks=[{name}]: {error}; name it as module:factory, on PYTHONPATH") from error
    return HarmlessSink(name, make(run_dir, resume_step, redact(resolved)))


class Console:
    """What rank 0 shows on stderr: a progress bar on a terminal, else one plain line per log interval."""

    def __init__(
        self, steps: int, start_step: int = 0, terminal: bool | None = None, seconds_left: float = math.inf
    ) -> None:
        """`seconds_left` of a time budget end the run, if `steps` do not do so first."""
        self._steps, self._deadline = steps, time.monotonic() + seconds_left
        self._times: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=32)
        self._progress: Progress | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            width = len(f"step {steps}/{steps}")
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=width)),
                BarColumn(bar_width=10),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=RichConsole(stderr=True),
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=steps, completed=start_step)
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._times.append((step, time.monotonic()))
        training = {name: value for name, value in metrics.items() if not name.startswith("eval/")}
        if self._progress is not None:
            text = train_line(training, self._eta_seconds())
            self._progress.update(self._task, completed=step, description=text or None)
        elif text := train_line(training, self._eta_seconds()):
            self.say(f"step {step}/{self._steps}  {text}")
        if text := eval_line(metrics):
            self.say(f"eval {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """One line that does not break the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _say(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _eta_seconds(self) -> float | None:
        (first, start), (last, now) = self._times[0], self._times[-1]
        if last == first:
            return None
        return max(0.0, min((self._steps - last) * (now - start) / (last - first), self._deadline - now))


def train_line(metrics: Mapping[str, float], eta_seconds: float | None) -> str:
    """The parts of a training line that `metrics` has, as `loss 6.123  mlm 5.900  …  12.3k tok/s  eta 0:01:23`."""
    if "train/loss" not in metrics:
        return ""
    parts = [
        f"{label} {metrics[name]:{form}}"
        for label, name, form in (
            ("loss", "train/loss", ".3f"),
            ("mlm", "train/mlm_loss", ".3f"),
            ("nsp", "train/nsp_loss", ".3f"),
            ("lr", "train/lr", ".1e"),
            ("mfu", "throughput/mfu", ".1%"),
        )
        if name in metrics
    ]
    if "throughput/tokens_per_second" in metrics:
        parts.append(f"{_thousands(metrics['throughput/tokens_per_second'])} tok/s")
    if eta_seconds is not None:
        parts.append(f"eta {_clock_time(eta_seconds)}")
    return "  ".join(parts)


def eval_line(metrics: Mapping[str, float]) -> str:
    """The evaluation in `metrics`, as `mlm_loss 5.123  mlm_accuracy 20.1%  …`; empty if there is none."""
    return "  ".join(
        f"{name[5:]} {value:.1%}" if name.endswith("accuracy") else f"{name[5:]} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("eval/") and isinstance(value, float)
    )


def _thousands(value: float) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.1f}{unit}"
    return f"{value:.0f}"


def _clock_time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


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

    def say(self, text: str) -> None:
        """A line for people, on rank 0's terminal only."""
        if self._console is not None:
            self._console.say(text)

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
    is_main: bool,
    resume_step: int | None,
    wandb_id: str | None,
    resolved: Mapping[str, Any],
    seconds: float = 0.0,
) -> Telemetry:
    """The telemetry that `config` asks for of a run that has trained for `seconds`.

    `wandb_id` is a checkpoint's; `resolved` the whole configuration as data.

    Raises `UserError` when TensorBoard is asked for and not there, `DiskError` when metrics.jsonl cannot be written.
    """
    if not is_main:
        return Telemetry([], None, wandb_id)
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_NAME, resume_step)]
    if config.log.tensorboard:
        sinks.append(HarmlessSink("TensorBoard", TensorBoardSink(run_dir / "tensorboard", resume_step)))
    sinks += [sink_of_your_own(name, run_dir, resume_step, resolved) for name in config.log.sinks]
    if config.wandb.mode is not WandbMode.disabled:
        wandb_id = _wandb_id(run_dir, wandb_id)
        sinks.append(WandbSink(config, run_dir, wandb_id, resolved))
    seconds_left = math.inf if config.budget.hours is None else 3600 * config.budget.hours - seconds
    return Telemetry(sinks, Console(config.steps, resume_step or 0, seconds_left=seconds_left), wandb_id)


def _wandb_id(run_dir: Path, from_checkpoint: str | None) -> str:
    """The run's W&B id: the checkpoint's, else the run directory's, else a new one; kept in the run directory."""
    path = run_dir / WANDB_ID_NAME
    with _disk(path):
        kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        run_id = from_checkpoint or kept or secrets.token_hex(4)
        if run_id != kept:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text(run_id + "\n", encoding="utf-8")
            temporary.replace(path)
    return run_id
