"""The lines of a run as they come, wherever it trains."""

import time
from pathlib import Path

from cloze.errors import ExitCode, UserError
from cloze.log import log
from pretrain.telemetry.console import eval_line, train_line
from pretrain.telemetry.metrics_file import METRICS_NAME, Row, newest_rows
from pretrain.telemetry.standing import standing_of

_FIRST_ROWS = 10  # that are told at once
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 10.0  # without a row: then where the run stands is told


def follow(directory: Path) -> int:
    """Print what comes until the run ends. Raises `UserError` where there is nothing to follow."""
    rows = newest_rows(directory / METRICS_NAME)
    if not rows and standing_of(directory).state not in ("running", "not begun"):
        raise UserError(f"{directory}: has no metrics and does not run; python -m pretrain.runs lists what does")
    told: Row = {}
    for row in rows[-_FIRST_ROWS:]:
        told = _tell(row, told)
    heard = time.monotonic()
    while (standing := standing_of(directory, rows)).state == "running":
        time.sleep(_POLL_SECONDS)
        rows = newest_rows(directory / METRICS_NAME)
        before = told
        for row in (row for row in rows if row["step"] >= told.get("step", -1)):
            told = _tell(row, told)
        if told != before:
            heard = time.monotonic()
        elif time.monotonic() > heard + _PATIENCE_SECONDS:
            heard = time.monotonic()
            log.info(
                f"{directory}: at step {standing.step:,}, no new line for {max(0.0, time.time() - standing.seen):.0f} s"
            )
    log.info(f"{directory}: {standing.line} at step {standing.step:,}; now: {standing.advice}")
    if standing.command:
        print(standing.command)
    return ExitCode.OK


def _tell(row: Row, told: Row) -> Row:
    """Print what is new in it; an evaluation comes into the row of a training line that was told before."""
    step, known = row["step"], told if told.get("step") == row["step"] else {}
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key not in known}
    if text := train_line(numbers, None):
        print(f"step {step:,}  {text}", flush=True)
    if text := eval_line(numbers):
        print(f"eval {step:,}  {text}", flush=True)
    return row
