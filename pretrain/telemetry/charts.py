"""The numbers behind the charts of a report: which metrics share a chart, thinned, over every axis, with marks.

`templates/report.js` draws them. Thinning keeps the mean of neighbours, and the least and the greatest of them, so that
a spike shows however long a run is.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cloze import drawing
from cloze.drawing import Line
from pretrain.curves import Curve, shares_that_tell, written_curves
from pretrain.telemetry.metrics_file import ROLLED_BACK_NAME, Row
from pretrain.telemetry.standing import stretches

AXES = ("step", "samples", "tokens", "seconds")

_MOST_POINTS = 500  # of a line: a screen has not many more columns
_ALL_POINTS = 26_000  # of a page, so that it stays below 500 kB
_GIVEN_POINTS = 100  # of a curve that the configuration gives
_DRAWN_POINTS = 100  # of a line of a picture
_MOST_MARKS = 60
_TAIL_BYTES = 1 << 20  # of what was rolled back


class Chart(NamedTuple):
    """What is drawn together."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]  # (name of the metric, what people call it)
    percent: bool = False
    log: bool = False


_CHARTS = (
    Chart(
        "MLM loss",
        "nats per masked token",
        (
            ("train/mlm_loss", "training"),
            ("eval/mlm_loss", "held-out"),
            ("eval/frequencies_loss", "word frequencies alone"),
        ),
    ),
    Chart("MLM accuracy", "", (("train/mlm_accuracy", "training"), ("eval/mlm_accuracy", "held-out")), percent=True),
    Chart("NSP loss", "nats per pair", (("train/nsp_loss", "training"), ("eval/nsp_loss", "held-out"))),
    Chart(
        "NSP accuracy",
        "",
        (
            ("train/nsp_accuracy", "training"),
            ("eval/nsp_accuracy", "held-out"),
            ("eval/majority_nsp_accuracy", "the more frequent label"),
        ),
        percent=True,
    ),
    Chart(
        "Grammar",
        "minimal pairs told apart",
        (
            ("eval/grammar_accuracy", "all"),
            ("eval/grammar_agreement_accuracy", "agreement"),
            ("eval/grammar_frequencies_accuracy", "word frequencies alone"),
        ),
        percent=True,
    ),
    Chart("Total loss", "nats", (("train/loss", "training"),)),
    Chart("Learning rate", "", (("train/lr", "training"),)),
    Chart("Throughput", "tokens per second", (("throughput/tokens_per_second", "training"),)),
    Chart("Gradient norm", "before clipping", (("train/grad_norm", "training"),), log=True),
    Chart("Model FLOPs utilization", "", (("throughput/mfu", "training"),), percent=True),
    Chart("Waiting for data", "share of the time", (("data/wait_fraction", "training"),), percent=True),
    Chart("Updates skipped", "between two lines of metrics", (("train/skipped_steps", "training"),)),
    Chart("Loss scale", "of fp16", (("train/loss_scale", "training"),), log=True),
)
_RULES = ("eval/frequencies_loss", "eval/majority_nsp_accuracy", "eval/grammar_frequencies_accuracy")
_UNLESS_OTHER = {"train/skipped_steps": 0.0}  # drawn where it is ever something else


class Lines(NamedTuple):
    """One run to draw."""

    label: str
    rows: Sequence[Row]
    config: Mapping[str, Any]
    directory: Path | None = None


def chart_data(runs: Sequence[Lines]) -> dict[str, Any]:
    """What report.js reads: charts with their series, the places of the points, marks. Of many runs the first eight."""
    clocks = [training_seconds(run.rows) for run in runs]
    charts = [chart for chart in (*_CHARTS, *_layer_charts(runs), *_logged_curves(runs)) if _has(runs, chart)]
    wanted = [(chart, number, name, told) for chart in charts for number, name, told in _series(runs, chart)]
    most = max(40, min(_MOST_POINTS, _ALL_POINTS // (3 * max(1, len(wanted)))))
    grids = _Grids(runs, clocks, most)
    found: dict[str, dict[str, Any]] = {}
    for chart, number, name, told in wanted:
        body = found.setdefault(
            chart.title,
            {"title": chart.title, "unit": chart.unit, "percent": chart.percent, "log": chart.log, "series": []},
        )
        colour = number if len(runs) > 1 else len(body["series"])
        body["series"].append(
            grids.series(number, name)
            | {
                "run": number,
                "name": told if len(runs) == 1 else f"{runs[number].label}, {told}",
                "told": told,
                "kind": _kind(name),
                "colour": colour,
                "smooth": (name.startswith("train/") and name != "train/lr") or name.startswith("throughput/"),
            }
        )
    given = list(_given_charts(runs, grids))
    marks = [mark for number, run in enumerate(runs) for mark in _marks(number, run, clocks[number])]
    return {"charts": [*found.values(), *given], "grids": grids.written, "marks": marks}


class Drawn(NamedTuple):
    """A chart for readers without scripts: what stands above it, (its lines' names, looks and colours), the SVG."""

    title: str
    unit: str
    legend: list[tuple[str, str, int]]
    svg: str


def drawn(data: Mapping[str, Any], axis: str) -> list[Drawn]:
    """The charts of `chart_data` as pictures, over `axis`, in few points."""
    axis, found = "step" if axis == "seconds" else axis, []
    for chart in data["charts"]:
        lines = [
            Line(_thin(places), _thin(one["y"]), one["kind"], one["colour"], rough=one["smooth"])
            for one in chart["series"]
            if (places := data["grids"][one["grid"]].get(chart.get("axis", axis)))
        ]
        if svg := drawing.lines(chart["title"], lines, percent=chart["percent"], log=chart["log"]):
            legend = [(one["name"], one["kind"], one["colour"] % 8) for one in chart["series"]]
            if [kind for _, kind, _ in legend] == ["train"]:
                legend = []
            found.append(Drawn(chart["title"], chart["unit"], legend, svg))
    return found


def _thin(values: Sequence[float | None]) -> list[float | None]:
    """Means of neighbours, where there are more than a small picture has room for."""
    size = -(-len(values) // _DRAWN_POINTS)
    if size <= 1:
        return list(values)
    groups = [[one for one in values[at : at + size] if one is not None] for at in range(0, len(values), size)]
    return [sum(group) / len(group) if group else None for group in groups]


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that no text in it can end, inside a <script> of a page."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def training_seconds(rows: Sequence[Row]) -> list[float]:
    """Seconds of training at each row, without the time between two starts."""
    breaks, total, found = {*stretches(rows)}, 0.0, [0.0] if rows else []
    usual = sorted(max(0.0, (b.get("time") or 0) - (a.get("time") or 0)) for a, b in pairwise(rows))
    for number, (before, row) in enumerate(pairwise(rows), 1):
        gap = max(0.0, (row.get("time") or 0) - (before.get("time") or 0))
        total += usual[len(usual) // 2] if number in breaks else gap
        found.append(round(total, 1))
    return found


class _Grids:
    """Places of points, shared by the metrics that stand in the same rows."""

    def __init__(self, runs: Sequence[Lines], clocks: Sequence[Sequence[float]], most: int) -> None:
        self.written: list[dict[str, Any]] = []
        self._runs, self._clocks, self._most = runs, clocks, most
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}

    def series(self, number: int, name: str) -> dict[str, Any]:
        """`grid`, `y`, and where several rows make a point the `low` and `high` of them."""
        rows = self._runs[number].rows
        indices = tuple(index for index, row in enumerate(rows) if name in row)
        size = max(1, -(-len(indices) // self._most))
        groups = [indices[start : start + size] for start in range(0, len(indices), size)]
        key = number, tuple(group[-1] for group in groups)
        if key not in self._known:
            self._known[key] = self.add(self._places(number, [group[-1] for group in groups]))
        values = [[_finite(rows[index][name]) for index in group] for group in groups]
        known = [[value for value in group if value is not None] for group in values]
        found: dict[str, Any] = {
            "grid": self._known[key],
            "y": [_round(sum(group) / len(group)) if group else None for group in known],
        }
        if size > 1:
            found["low"] = [_round(min(group)) if group else None for group in known]
            found["high"] = [_round(max(group)) if group else None for group in known]
        return found

    def _places(self, number: int, indices: Sequence[int]) -> dict[str, Any]:
        rows, clock = self._runs[number].rows, self._clocks[number]
        places: dict[str, Any] = {
            axis: [rows[index].get(axis) for index in indices] for axis in ("step", "samples", "tokens")
        }
        places = {axis: found for axis, found in places.items() if None not in found}
        return places | {"seconds": [clock[index] for index in indices]}

    def add(self, places: dict[str, Any]) -> int:
        self.written.append(places)
        return len(self.written) - 1


def _series(runs: Sequence[Lines], chart: Chart) -> Iterator[tuple[int, str, str]]:
    """(number of the run, metric, what it is called) of what there is to draw; splits with names beside val."""
    for number, run in enumerate(runs):
        names = {key for row in run.rows for key in row}
        for name, told in chart.metrics:
            if name in _RULES and number and len(runs) > 1:
                continue  # one corpus' rule is enough
            group, _, last = name.rpartition("/")
            splits = sorted(key for key in names if re.fullmatch(rf"eval/[^/]+/{re.escape(last)}", key))
            for each in [name, *(splits if group == "eval" else ())]:
                if each in names and any(_finite(row.get(each)) is not None for row in run.rows):
                    yield number, each, told if each == name else f"{told}, {each.split('/')[1]}"


def _has(runs: Sequence[Lines], chart: Chart) -> bool:
    usual = _UNLESS_OTHER.get(chart.metrics[0][0])
    if usual is not None:
        return any(row.get(chart.metrics[0][0], usual) != usual for run in runs for row in run.rows)
    return True


def _layer_charts(runs: Sequence[Lines]) -> Iterator[Chart]:
    """`layers/3/grad_norm` of all layers in one chart each."""
    names = {key for run in runs for row in run.rows for key in row if key.startswith("layers/")}
    titles = {
        "attention_entropy": ("Attention entropy by layer", "nats", False),
        "grad_norm": ("Gradient norm by layer", "", True),
        "update_ratio": ("Update over weight by layer", "", True),
    }
    for last in sorted({name.rpartition("/")[2] for name in names}):
        layers = sorted((name for name in names if name.endswith(f"/{last}")), key=_layer)
        title, unit, log = titles.get(last, (f"{last} by layer", "", False))
        yield Chart(title, unit, tuple((name, f"layer {name.split('/')[1]}") for name in layers), log=log)


def _kind(name: str) -> str:
    """How a line looks."""
    if name in _RULES:
        return "rule"
    split = "eval/" in name and name.count("/") > 1
    return "eval other" if split or "agreement" in name else "eval" if name.startswith("eval/") else "train"


def _layer(name: str) -> tuple[int, str]:
    middle = name.split("/")[1]
    return (int(middle) if middle.isdecimal() else -1), name


def _logged_curves(runs: Sequence[Lines]) -> Iterator[Chart]:
    """What changes over a run by its configuration, as every step had it."""
    for name in sorted({key for run in runs for row in run.rows for key in row if key.startswith("curves/")}):
        yield Chart(name.removeprefix("curves/"), "as trained", ((name, "training"),))


def _given_charts(runs: Sequence[Lines], grids: _Grids) -> Iterator[dict[str, Any]]:
    """A configuration's curves over the share of the run, a chart for each key; those still to come."""
    given = [{key: curve for key, curve in written_curves(run.config) if not _is_past(run, key)} for run in runs]
    for key in dict.fromkeys(key for found in given for key in found):
        series = []
        for number, found in enumerate(given):
            if curve := found.get(key):
                shares = _shares(curve)
                name = "as set" if len(runs) == 1 else f"{runs[number].label}, as set"
                series.append(
                    {
                        "grid": grids.add({"share": [_round(share) for share in shares]}),
                        "y": [_round(curve.at(share)) for share in shares],
                        "run": number,
                        "name": name,
                        "told": "as set",
                        "kind": "train",
                        "colour": number,
                        "smooth": False,
                    }
                )
        yield {"title": f"{key} as it was set", "unit": "", "percent": False, "log": False, "axis": "share"} | {
            "series": series
        }


def _is_past(run: Lines, key: str) -> bool:
    """Whether the run has come to its end, and logged what became of the curve."""
    last, steps = run.rows[-1] if run.rows else {}, run.config.get("steps")
    return f"curves/{key}" in last and isinstance(steps, int) and last["step"] >= steps


def _shares(curve: Curve) -> list[float]:
    return sorted({*(i / _GIVEN_POINTS for i in range(_GIVEN_POINTS + 1)), *shares_that_tell(curve)})


def _marks(number: int, run: Lines, clock: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Where a run was resumed, went back, was changed, left the plateau."""
    rows, who = run.rows, f"{run.label}: "
    if not rows:
        return
    found: list[tuple[int, str, str]] = []
    for index in stretches(rows):
        gap = (rows[index].get("time") or 0) - (rows[index - 1].get("time") or 0)
        found.append((index, "resume", f"went on after {told_seconds(gap)}"))
    for step, text in _changes(run.directory):
        found.append((_index(rows, step), "change", f"changed: {text}"))
    again = _rollbacks(run.directory)
    found += [(_index(rows, step), "rollback", "rows after this step were trained again") for step in again]
    skips = _skips(run.directory)
    found += [(_index(rows, step), "skip", "an update was skipped: gradients were not finite") for step in skips]
    left = next((row["eval/left_plateau_tokens"] for row in reversed(rows) if "eval/left_plateau_tokens" in row), None)
    if left is not None:
        there = [index for index, row in enumerate(rows) if (row.get("tokens") or 0) >= left][:1]
        found += [(index, "plateau", "left the plateau of word frequencies") for index in there]
    for index, kind, text in found[:_MOST_MARKS]:
        row = rows[index]
        places = {axis: row.get(axis, 0) for axis in ("step", "samples", "tokens")}
        yield {
            "run": number,
            "kind": kind,
            "text": f"{who}step {row['step']:,}: {text}",
            "seconds": clock[index],
            **places,
        }


def _index(rows: Sequence[Row], step: int) -> int:
    """Of the last row up to `step`."""
    return max((index for index, row in enumerate(rows) if row["step"] <= step), default=0)


def _changes(directory: Path | None) -> Iterator[tuple[int, str]]:
    for row in _objects(directory, "changes.jsonl"):
        changed = row.get("changed")
        if isinstance(row.get("step"), int) and isinstance(changed, dict):
            pairs = ((key, pair) for key, pair in changed.items() if isinstance(pair, list) and len(pair) == 2)
            yield row["step"], ", ".join(f"{key} {a} → {b}" for key, (a, b) in pairs)


def _rollbacks(directory: Path | None) -> list[int]:
    """The steps from which rows were set aside, as the run went back: their numbers fall where the next set begins."""
    steps = [row["step"] for row in _objects(directory, ROLLED_BACK_NAME) if isinstance(row.get("step"), int)]
    begins = steps[:1] + [b for a, b in pairwise(steps) if b <= a]
    return sorted({*begins})


def _skips(directory: Path | None) -> list[int]:
    return sorted({row["step"] for row in _objects(directory, "skipped.jsonl") if isinstance(row.get("step"), int)})


def _objects(directory: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of a small file of JSON lines, torn ones left out."""
    if directory is None:
        return []
    try:
        with (directory / name).open("rb") as file:
            lines = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def told_seconds(seconds: float) -> str:
    """`4 s`, `3 min`, `1.5 h`, `2.1 days`."""
    for most, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < most:
            return f"{seconds / unit:.{1 if name == 'h' else 0}f} {name}"
    return f"{seconds / 86_400:.1f} days"


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _round(value: float) -> float:
    """To five digits: what a chart shows is coarser."""
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
