"""One self-contained HTML page about one run, or over several.

Reads what a run directory holds (metrics.jsonl, config.yaml, environment.json) and nothing else; needs no network to
make or to read. Curves are inline SVG by matplotlib, coloured by CSS so that they follow the reader's light or dark
theme.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze.errors import DiskError, UserError, first_line
from cloze.files import write_whole
from cloze.ownership import page_mark, require_own_file
from cloze.templates import render
from pretrain.changes import read_changes
from pretrain.telemetry.sinks import METRICS_NAME

REPORT_NAME = "report.html"
_PAGE_MARK = page_mark("report on runs")

_MAX_POINTS = 1000  # per curve: more would only make the page heavy
_PALETTE = ("#2f7ed8", "#d95f02", "#1b9e77", "#c2478f", "#8a6fd1", "#a6761d", "#d64550", "#5b8c2a")
_INK, _GRID = "#010203", "#040506"  # stand-ins that CSS variables replace

# (title, metrics that share the chart, whether its axis is logarithmic); held-out metrics are dashed
_CHARTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("MLM loss, nats per masked token", ("train/mlm_loss", "eval/mlm_loss", "eval/frequencies_loss"), False),
    ("MLM accuracy", ("train/mlm_accuracy", "eval/mlm_accuracy"), False),
    ("NSP loss, nats per pair", ("train/nsp_loss", "eval/nsp_loss"), False),
    ("NSP accuracy", ("train/nsp_accuracy", "eval/nsp_accuracy", "eval/majority_nsp_accuracy"), False),
    (
        "Grammar: minimal pairs, all and agreement",
        ("eval/grammar_accuracy", "eval/grammar_agreement_accuracy", "eval/grammar_frequencies_accuracy"),
        False,
    ),
    ("Total loss", ("train/loss",), False),
    ("Learning rate", ("train/lr",), False),
    ("Tokens per second", ("throughput/tokens_per_second",), False),
    ("Gradient norm", ("train/grad_norm",), True),
    ("Model FLOPs utilization", ("throughput/mfu",), False),
    ("Share of time spent waiting for data", ("data/wait_fraction",), False),
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run directory says of its run."""

    label: str
    metrics: Sequence[Mapping[str, Any]]  # one object per logged step, ascending
    config: Mapping[str, Any]
    config_yaml: str
    environment: Mapping[str, Any]
    told: Mapping[str, str]  # what changed between its starts, and what is wrong with it

    def series(self, name: str, axis: str = "step") -> tuple[list[int], list[float]]:
        """Steps (or what else is the `axis`) and values of one metric; null becomes NaN."""
        points = [(row[axis], row[name]) for row in self.metrics if name in row and axis in row]
        return [at for at, _ in points], [math.nan if value is None else float(value) for _, value in points]

    def named(self, name: str) -> list[str]:
        """Of a held-out metric, `eval/mlm_loss`, the same ones of splits with names: `eval/news/mlm_loss`, …"""
        group, _, last = name.rpartition("/")
        found = {key for row in self.metrics for key in row if re.fullmatch(rf"eval/[^/]+/{re.escape(last)}", key)}
        return sorted(found) if group == "eval" else []


def read_run(directory: Path, label: str) -> RunData:
    """Read a run directory. Raises `UserError` where there are no metrics."""
    rows = read_metrics(directory / METRICS_NAME)
    if not rows:
        raise UserError(f"{directory / METRICS_NAME}: no metrics in it; name the directory of a run that has trained")
    config_yaml = _text(directory / "config.yaml")
    try:
        config = yaml.safe_load(config_yaml)
        environment = json.loads(_text(directory / "environment.json") or "{}")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{directory}: config.yaml or environment.json is damaged ({first_line(error)})") from error
    return RunData(
        label=label,
        metrics=rows,
        config=config if isinstance(config, dict) else {},
        config_yaml=config_yaml,
        environment=environment if isinstance(environment, dict) else {},
        told=read_changes(directory) | _verdict(directory),
    )


def _verdict(directory: Path) -> dict[str, str]:
    try:
        found = json.loads(_text(directory / "status.json") or "{}").get("verdict")
    except (ValueError, AttributeError):
        return {}
    return {"verdict": found} if isinstance(found, str) else {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, without a line that a live run has half written. [] where there is none."""
    rows = []
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


class Table(NamedTuple):
    """A section of the page that somebody else knows: text, which is escaped."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(run_dirs: Sequence[Path], out: Path, tables: Sequence[Table] = (), axis: str = "step") -> Path:
    """Write the page over `run_dirs` to `out`; `tables` stand after the summary.

    Raises `UserError` where a run has no metrics, `DiskError` where `out` cannot be written.
    """
    runs = [read_run(directory, label) for directory, label in zip(run_dirs, _labels(run_dirs), strict=True)]
    require_own_file(out, (_PAGE_MARK, "<title>Cloze: "), "--out ")  # the second: of earlier versions
    page = _page(runs, tables, axis)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode())
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror}; free space or choose another --out") from error
    return out


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """Directory names, or whole paths where two bear the same name."""
    names = [directory.resolve().name for directory in run_dirs]
    return names if len(set(names)) == len(names) else [str(directory) for directory in run_dirs]


def _page(runs: Sequence[RunData], tables: Sequence[Table], axis: str) -> str:
    facts = [run_facts(run) for run in runs]
    names = dict.fromkeys(name for column in facts for name in column)
    charts = [
        (heading, svg)
        for number, (heading, metrics, logarithmic) in enumerate(_CHARTS)
        if (svg := _chart(runs, metrics, axis, logarithmic, f"c{number}-"))
    ]
    return render(
        __file__,
        "report.html",
        mark=_PAGE_MARK,
        title="Cloze: " + ", ".join(run.label for run in runs),
        labels=[run.label for run in runs],
        facts=[(name, [column.get(name, "") for column in facts]) for name in names],
        tables=tables,
        charts=charts,
        palette=_PALETTE,
        files=[file for run in runs for file in _files(run)],
    )


def _chart(runs: Sequence[RunData], names: Sequence[str], axis: str, logarithmic: bool, prefix: str) -> str:
    """One chart as inline SVG, or nothing where no run has the metrics. User's text never enters it."""
    from matplotlib import rc_context  # half a second: only where something is drawn
    from matplotlib.figure import Figure

    drawn = False
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            colour = _PALETTE[index % len(_PALETTE)]
            for name in [each for main in names for each in (main, *run.named(main))]:
                places, values = thinned(*run.series(name, axis))
                drawn = drawn or any(math.isfinite(value) for value in values)
                held_out = name.startswith("eval/")
                look: dict[str, Any] = (
                    {"linestyle": "--", "marker": "o", "markersize": 3} if held_out else {"linewidth": 1.3}
                )
                if name not in names:  # of a split with a name
                    look |= {"linestyle": ":", "marker": "x"}
                axes.plot(places, values, color=colour, **look)
        if not drawn:
            return ""
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel(axis, color=_INK)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.tick_params(which="both", color=_GRID, labelcolor=_INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_GRID)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(buffer.getvalue(), prefix)


def _inline(svg: str, prefix: str) -> str:
    """A stand-alone SVG file -> an element for an HTML page: themed, scalable, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for size in ("width", "height"):  # the viewBox stays
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace(_INK, "var(--soft)").replace(_GRID, "var(--grid)").strip()


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most `_MAX_POINTS` points: means over runs of neighbours, each at the last step of its run."""
    size = -(-len(steps) // _MAX_POINTS)
    if size <= 1:
        return list(steps), list(values)
    starts = range(0, len(steps), size)
    means = []
    for start in starts:
        part = [value for value in values[start : start + size] if math.isfinite(value)]
        means.append(sum(part) / len(part) if part else math.nan)
    return [steps[min(start + size, len(steps)) - 1] for start in starts], means


def run_facts(run: RunData) -> dict[str, str]:
    """What people compare of a run, in words and figures."""
    last = run.metrics[-1]
    facts = {"steps": f"{last['step']:,}" + (f" of {run.config['steps']:,}" if "steps" in run.config else "")}
    for name in ("samples", "tokens"):
        _, counts = run.series(name)
        if counts:
            facts[name] = f"{counts[-1]:,.0f}"
    labels = [
        ("training loss", "train/loss"),
        ("training MLM loss", "train/mlm_loss"),
        ("training NSP loss", "train/nsp_loss"),
        ("held-out MLM loss", "eval/mlm_loss"),
        ("held-out MLM accuracy", "eval/mlm_accuracy"),
        ("held-out NSP loss", "eval/nsp_loss"),
        ("held-out NSP accuracy", "eval/nsp_accuracy"),
        ("grammar, minimal pairs", "eval/grammar_accuracy"),
        ("grammar, word frequencies alone", "eval/grammar_frequencies_accuracy"),
        ("grammar, agreement", "eval/grammar_agreement_accuracy"),
    ]
    labels += [(f"{label}, {each.split('/')[1]}", each) for label, name in labels for each in run.named(name)]
    for label, name in labels:
        _, values = run.series(name)
        form = ".1%" if name.endswith("accuracy") else ".3f"
        if len(values) > 1:
            facts[label] = f"{values[0]:{form}} → {values[-1]:{form}}"
        elif values:
            facts[label] = f"{values[0]:{form}}"
    _, speeds = run.series("throughput/tokens_per_second")
    if speeds:
        facts["median tokens per second"] = f"{sorted(speeds)[len(speeds) // 2]:,.0f}"
    times = [row["time"] for row in run.metrics if "time" in row]
    if len(times) > 1:
        facts["time from first to last logged step"] = duration(times[-1] - times[0])
    return {**facts, **_highlights(run), **run.told}


def _highlights(run: RunData) -> dict[str, str]:
    """The lines of the configuration that people compare."""
    found = {}
    model = run.config.get("model")
    if isinstance(model, dict):
        found["model"] = f"{model.get('name')}: {model.get('num_layers')} layers, width {model.get('hidden_size')}"
    for label, path in (
        ("corpus", "data.path"),
        ("global batch", "global_batch_size"),
        ("peak learning rate", "optim.lr"),
        ("ZeRO stage", "zero"),
        ("precision", "precision"),
        ("seed", "seed"),
    ):
        value: Any = run.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[label] = str(value)
    gpus = run.environment.get("gpus")
    if "world_size" in run.environment:
        device = gpus[0] if isinstance(gpus, list) and gpus else "CPU"
        found["processes"] = f"{run.environment['world_size']} x {device}"
    return found


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `4 s`."""
    minutes, second = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {second:02d} s" if minutes else f"{second} s"


def _files(run: RunData) -> list[tuple[str, str, str]]:
    """(run, name of the file, what stands in it) of the files that are not empty."""
    environment = json.dumps(run.environment, indent=1, ensure_ascii=False)
    files = [("config.yaml", run.config_yaml), ("environment.json", environment)]
    return [(run.label, name, text) for name, text in files if text not in ("", "{}")]
