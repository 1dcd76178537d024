"""What rank 0 shows people on stderr."""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from cloze.log import log


class Console:
    """What rank 0 shows on stderr: a progress bar on a terminal, else one plain line per log interval.

    The bar stays below whatever else goes to `sys.stderr` while it is there.
    """

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
            log.info(f"step {step}/{self._steps}  {text}")
        if text := eval_line(metrics):
            log.info(f"eval {step}/{self._steps}  {text}")

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
        if name.startswith("eval/") and isinstance(value, float) and not name.endswith("_tokens")
        if not name.startswith("eval/grammar/")  # by phenomenon: a dozen
    )


def _thousands(value: float) -> str:
    for divisor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.1f}{unit}"
    return f"{value:.0f}"


def _clock_time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
