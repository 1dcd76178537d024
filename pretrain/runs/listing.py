"""Runs as lines of text: one each, or side by side."""

import time
from collections.abc import Sequence
from pathlib import Path

from cloze.errors import UserError
from pretrain.telemetry.charts import told_seconds
from pretrain.telemetry.recipes import differing
from pretrain.telemetry.report import labels, read_run, run_facts
from pretrain.telemetry.standing import Standing, run_directories, standing_of

HEAD = ("run", "state", "step", "loss", "held-out", "tokens/s", "left", "last sign of life")


def listed(root: Path) -> list[Standing]:
    """Where every run under `root` stands, by name. Raises `UserError` where there is none."""
    found = run_directories(root)
    if not found:
        raise UserError(f"{root}: holds no run; name the directory that does with --root, or train one")
    return [standing_of(directory) for directory in found]


def find(root: Path, name: str) -> Path:
    """The run of that name, or at that path. Raises `UserError` where there is none."""
    for place in (root / name, Path(name)):
        if (place / "config.yaml").is_file() or (place / "metrics.jsonl").is_file():
            return place
    known = ", ".join(str(path.relative_to(root)) for path in run_directories(root)[:8]) or "none"
    raise UserError(f"{name}: no such run, neither there nor in {root}; there are {known}")


def cells(standing: Standing, now: float) -> tuple[str, ...]:
    """What a list says of one run, in the order of `HEAD`."""
    step = f"{standing.step:,}" + (f"/{standing.steps:,}" if standing.steps else "")
    return (
        standing.name,
        standing.line,
        step,
        _loss(standing.loss),
        _loss(standing.held_out),
        f"{standing.tokens_per_second:,.0f}" if standing.tokens_per_second else "",
        told_seconds(standing.remaining_seconds) if standing.remaining_seconds is not None else "",
        f"{told_seconds(max(0.0, now - standing.seen))} ago" if standing.seen else "",
    )


def table(standings: Sequence[Standing]) -> list[str]:
    """Lines of equal columns."""
    now = time.time()
    return _columns([HEAD, *(cells(standing, now) for standing in standings)])


def compared(directories: Sequence[Path]) -> list[str]:
    """In which keys the runs differ, then how far they came. Raises `UserError` of a run without metrics."""
    runs = [read_run(path, label) for path, label in zip(directories, labels(directories), strict=True)]
    rows = [("", *(run.label for run in runs))]
    rows += [(key, *values) for key, values in differing([run.config for run in runs])]
    if len(rows) == 1:
        rows.append(("no key differs", *("" for _ in runs)))
    facts = [run_facts(run) for run in runs]
    names = dict.fromkeys(name for column in facts for name in column)
    told = [(name, *(column.get(name, "") for column in facts)) for name in names]
    return _columns([*rows, ("", *("" for _ in runs)), *(row for row in told if len({*row[1:]}) > 1)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}"
