"""One self-contained HTML page about one run, or over several.

Reads what a run directory holds and nothing else; needs no network to make or to read. What a person wants first stands
first: where the run stands, what that means, what to do now. The page draws its charts itself (`templates/report.js`).
"""

import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cloze import drawing
from cloze.corpus import diagnosis
from cloze.corpus.manifest import read_manifest
from cloze.errors import DiskError, UserError, first_line
from cloze.files import parsed, write_whole
from cloze.ownership import page_mark, require_own_file
from cloze.storage import is_remote, local_path
from cloze.templates import render
from pretrain.changes import read_changes
from pretrain.curves import Curve
from pretrain.mixture import parse_mixture
from pretrain.telemetry.charts import Lines, as_script, chart_data, drawn, told_seconds, training_seconds
from pretrain.telemetry.metrics_file import METRICS_NAME, MetricsFile, Row, row_of
from pretrain.telemetry.predictions import Predictions, read_predictions
from pretrain.telemetry.recipes import differences, differing
from pretrain.telemetry.standing import Standing, standing_of

REPORT_NAME = "report.html"
COMPARISON_NAME = "compared.html"
_PAGE_MARK = page_mark("report on runs")

_MAX_POINTS = 1000  # per curve of a card: more would only make it heavy
_FEWEST_DOTS = 3  # runs, of which what came of a key is drawn
_COLUMNS = 6  # evaluations whose predictions stand side by side
_TEMPLATES = Path(__file__).parent / "templates"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run directory says of its run."""

    label: str
    directory: Path
    metrics: Sequence[Mapping[str, Any]]  # one object per logged step, ascending
    config: Mapping[str, Any]
    config_yaml: str
    environment: Mapping[str, Any]
    told: Mapping[str, str]  # what changed between its starts, and what is wrong with it

    def series(self, name: str, axis: str = "step") -> tuple[list[int], list[float]]:
        """Steps (or what else is the `axis`) and values of one metric; null becomes NaN."""
        points = [(row[axis], row[name]) for row in self.metrics if name in row and row.get(axis) is not None]
        return [at for at, _ in points], [math.nan if value is None else float(value) for _, value in points]

    def named(self, name: str) -> list[str]:
        """Of a held-out metric, `eval/mlm_loss`, the same ones of splits with names: `eval/news/mlm_loss`, …"""
        group, _, last = name.rpartition("/")
        found = {key for row in self.metrics for key in row if re.fullmatch(rf"eval/[^/]+/{re.escape(last)}", key)}
        return sorted(found) if group == "eval" else []


def read_run(directory: Path, label: str, metrics: MetricsFile | None = None) -> RunData:
    """Read a run directory; of long metrics what `MetricsFile` keeps. Raises `UserError` where there are none."""
    metrics = metrics or MetricsFile(directory / METRICS_NAME)
    metrics.refresh()
    rows = metrics.rows
    if not rows:
        raise UserError(f"{directory / METRICS_NAME}: no metrics in it; name the directory of a run that has trained")
    config_yaml = _text(directory / "config.yaml")
    try:
        config = yaml.load(config_yaml, Loader=_LOADER)  # noqa: S506 (both are safe ones)
        environment = parsed(_text(directory / "environment.json") or "{}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{directory}: config.yaml or environment.json is damaged ({first_line(error)})") from error
    return RunData(
        label=label,
        directory=directory,
        metrics=rows,
        config=config if isinstance(config, dict) else {},
        config_yaml=config_yaml,
        environment=environment if isinstance(environment, dict) else {},
        told=read_changes(directory) | _verdict(directory),
    )


def _verdict(directory: Path) -> dict[str, str]:
    try:
        found = parsed(_text(directory / "status.json") or "{}").get("verdict")
    except (ValueError, AttributeError):
        return {}
    return {"verdict": found} if isinstance(found, str) else {}


def read_metrics(path: Path) -> list[Row]:
    """The objects of a metrics.jsonl, without a line that a live run has half written. [] where there is none."""
    return [row for line in _text(path).splitlines() if (row := row_of(line))]


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
    """Write the page over `run_dirs` to `out`; `tables` stand after the charts.

    Raises `UserError` where a run has no metrics, or `out` is another page of a run's own, `DiskError` where it cannot
    be written.
    """
    if len(run_dirs) > 1 and out.name == REPORT_NAME and out.parent.resolve() in {one.resolve() for one in run_dirs}:
        raise UserError(f"--out {out}: is that run's own page; name another, such as {COMPARISON_NAME}")
    runs = [read_run(directory, label) for directory, label in zip(run_dirs, labels(run_dirs), strict=True)]
    require_own_file(out, (_PAGE_MARK, "<title>Cloze: "), "--out ")  # the second: of earlier versions
    page = report_page(runs, tables, axis)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode())
    except OSError as error:
        raise DiskError(f"{out}: {error.strerror}; free space or choose another --out") from error
    return out


def labels(run_dirs: Sequence[Path]) -> list[str]:
    """Directory names, or whole paths where two bear the same name."""
    names = [directory.resolve().name for directory in run_dirs]
    return names if len(set(names)) == len(names) else [str(directory) for directory in run_dirs]


class Figure(NamedTuple):
    """One thing that the first screen says of a run."""

    name: str
    value: str
    beside: str = ""


def report_page(runs: Sequence[RunData], tables: Sequence[Table] = (), axis: str = "step", live: str = "") -> str:
    """The whole page; `live` is where it finds what `fresh` gives, if somebody serves it."""
    standings = [standing_of(run.directory, run.metrics) for run in runs]
    facts = [run_facts(run) for run in runs]
    names = dict.fromkeys(name for column in facts for name in column)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    one = len(runs) == 1
    known = differences(runs[0].config) if one and runs[0].config else None
    apart = [] if one else differing([run.config for run in runs])
    data = _data(runs)
    return render(
        __file__,
        "report.html",
        mark=_PAGE_MARK,
        title="Cloze: " + ", ".join(run.label for run in runs),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src '{script_hash(script)}'; connect-src "
        + ("'self'" if live else "'none'"),
        script=script,
        data=as_script(data),
        drawn=drawn(data, axis),
        axis=axis,
        live=live,
        written=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        labels=[run.label for run in runs],
        standings=standings,
        figures=[figures(run, standing) for run, standing in zip(runs, standings, strict=True)],
        gauge=_gauge(runs[0], standings[0]) if one else None,
        facts=[(name, [column.get(name, "") for column in facts]) for name in names],
        tables=tables,
        known=known,
        differing=apart,
        outcomes=[*_outcomes(runs, apart)] if len(runs) >= _FEWEST_DOTS else [],
        best=None if one else _best(runs, apart),
        predictions=[(run.label, *_shown(found)) for run in runs if (found := read_predictions(run.directory)).guesses],
        findings=_findings(runs[0]) if one else [],
        files=[file for run in runs for file in _files(run)],
    )


class Best(NamedTuple):
    """Which of several runs is ahead, and why that may say less than it seems."""

    line: str
    caution: str


def _best(runs: Sequence[RunData], apart: Sequence[tuple[str, Sequence[str]]]) -> Best | None:
    """By the last held-out loss; None where no two runs have one."""
    known = [
        (values[-1], run) for run in runs if (values := run.series("eval/mlm_loss")[1]) and math.isfinite(values[-1])
    ]
    if len(known) < 2:
        return None
    (loss, first), (second_loss, second) = sorted(known, key=lambda one: one[0])[:2]
    line = f"{first.label} is ahead: held-out MLM loss {loss:.3f}, {second.label} {second_loss:.3f}"
    keys = {key for key, _ in apart}
    if any(key.startswith(("data.path", "data.mixture")) for key in keys):
        return Best("They have learned from different corpora: their losses do not compare", f"By them {line}.")
    tokens = [last for _, run in known if (last := run.series("tokens")[1][-1:])]
    if len({*map(tuple, tokens)}) > 1:
        return Best(
            line, "They have seen different numbers of tokens: compare their curves over tokens, not their ends."
        )
    alone = sorted(keys - {"seed"})
    return Best(line, f"They differ in {', '.join(alone)}." if alone else "They differ in their seeds alone.")


def _outcomes(runs: Sequence[RunData], apart: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, str, str]]:
    """(what, by which key, drawing) of the runs' last losses, for every number in which they differ."""
    for name, label in (("eval/mlm_loss", "held-out MLM loss"), ("train/mlm_loss", "training MLM loss")):
        last = [(run.series(name)[1] or [math.nan])[-1] for run in runs]
        known = [number for number, value in enumerate(last) if math.isfinite(value)]  # others diverged
        losses, names = [last[number] for number in known], [runs[number].label for number in known]
        for key, column in apart if len(known) > 1 else ():
            if svg := drawing.over_key(f"{label} by {key}", [column[number] for number in known], losses, names):
                yield label, key, svg
        if known:
            return


def fresh(runs: Sequence[RunData]) -> dict[str, Any]:
    """What a served page takes over while its runs go on: the numbers of its charts, and texts by their names."""
    texts: dict[str, str] = {}
    for number, run in enumerate(runs):
        standing = standing_of(run.directory, run.metrics)
        for figure in figures(run, standing):
            texts |= {f"{number}-{figure.name}": figure.value, f"{number}-{figure.name}-beside": figure.beside}
        texts |= {f"{number}-state": standing.line, f"{number}-advice": standing.advice}
        texts[f"{number}-share"] = f"{100 * (standing.share or 0):.1f}%"
    return {"data": _data(runs), "texts": texts}


def _data(runs: Sequence[RunData]) -> dict[str, Any]:
    return chart_data([Lines(run.label, run.metrics, run.config, run.directory) for run in runs])


def figures(run: RunData, standing: Standing) -> list[Figure]:
    """The first screen of one run, in the order in which a person asks."""
    step = f"{standing.step:,}" + (f" of {standing.steps:,}" if standing.steps else "")
    found = [Figure("step", step, f"{standing.tokens:,} tokens" if standing.tokens is not None else "")]
    for name, label in (("eval/mlm_loss", "held-out MLM loss"), ("train/mlm_loss", "training MLM loss")):
        _, values = run.series(name)
        if values:
            _, shares = run.series(name.replace("loss", "accuracy"))
            beside = f"{shares[-1]:.1%} of the masked tokens right" if shares else ""
            found.append(Figure(label, _loss(values[-1]), beside))
    if standing.tokens_per_second:
        _, mfu = run.series("throughput/mfu")
        found.append(
            Figure("tokens per second", f"{standing.tokens_per_second:,.0f}", f"MFU {mfu[-1]:.1%}" if mfu else "")
        )
    trained = training_seconds(run.metrics)[-1]
    told = f"trained for {told_seconds(trained)}"
    if standing.remaining_seconds is not None:
        found.append(Figure("time left", f"about {told_seconds(standing.remaining_seconds)}", told))
    else:
        found.append(Figure("time trained", told_seconds(trained), ""))
    if standing.seen:
        found.append(Figure("last sign of life", time.strftime("%H:%M:%S UTC", time.gmtime(standing.seen)),
                            time.strftime("%d %B %Y", time.gmtime(standing.seen))))  # fmt: skip
    return found


def _loss(value: float) -> str:
    return f"{value:,.3f}" if math.isfinite(value) else "not finite"


def _gauge(run: RunData, standing: Standing) -> list[tuple[str, float, float]]:
    """(what it is, nats, percent of what guessing gives) of the losses that a run is held against."""
    vocabulary, loss = vocabulary_size(run.directory), standing.held_out
    if loss is None:
        _, losses = run.series("train/mlm_loss")
        loss = losses[-1] if losses else None
    if not vocabulary or loss is None or not math.isfinite(loss):
        return []
    guess = math.log(vocabulary)
    marks = [("guessing", guess), ("word frequencies alone", standing.frequencies), ("this run", loss)]
    return [(name, value, min(100.0, 100 * value / guess)) for name, value in marks if value is not None]


def vocabulary_size(directory: Path) -> int:
    """Of the tokenizer in a run's directory; 0 where there is none."""
    try:
        body = parsed((directory / "tokenizer" / "tokenizer.json").read_bytes())
        added = {token["content"] for token in body.get("added_tokens", ())}
        return len({*body["model"]["vocab"]} | added)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def _shown(predictions: Predictions) -> tuple[list[int], list[tuple[Any, list[tuple[str, str, bool]]]]]:
    """Steps, and for each sentence (it, [(guess, how likely, whether it is right) at each of them])."""
    every = predictions.guesses
    wanted = sorted({round(i * (len(every) - 1) / max(1, _COLUMNS - 1)) for i in range(_COLUMNS)})
    columns = [every[index] for index in wanted]
    rows = [
        (
            gap,
            [
                (guesses[i].token, f"{guesses[i].probability:.0%}", guesses[i].token == gap.answer)
                for _, guesses in columns
            ],
        )
        for i, gap in enumerate(predictions.gaps)
    ]
    return [step for step, _ in columns], rows


def _findings(run: RunData) -> Sequence[diagnosis.Finding]:
    """The diagnosis of the run's corpus, where it still lies where it lay."""
    data = run.config.get("data")
    path = data.get("path") if isinstance(data, Mapping) else None
    if not isinstance(path, str) or is_remote(path):
        return []
    try:
        if not (local_path(path) / "manifest.json").is_file():
            return []
        return diagnosis.stored(read_manifest(local_path(path)))
    except UserError:
        return []


def script_hash(script: str) -> str:
    """What lets a browser run this script of the page and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()


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
    steps = run.config.get("steps")
    facts = {"steps": f"{last['step']:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")}
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
        ends = values[:: max(1, len(values) - 1)][:2]  # the first and the last
        if ends:
            facts[label] = " → ".join(f"{value:{form}}" if math.isfinite(value) else "not finite" for value in ends)
    _, speeds = run.series("throughput/tokens_per_second")
    if speeds:
        facts["median tokens per second"] = f"{sorted(speeds)[len(speeds) // 2]:,.0f}"
    times = [row["time"] for row in run.metrics if row.get("time") is not None]
    if len(times) > 1:
        facts["time from first to last logged step"] = duration(sum(max(0.0, b - a) for a, b in pairwise(times)))
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
    found |= told_mixture(run.config)
    if isinstance(phases := run.config.get("phases"), list):
        found["phases"] = "; ".join(_told_phase(phase) for phase in phases)
    gpus = run.environment.get("gpus")
    if "world_size" in run.environment:
        device = gpus[0] if isinstance(gpus, list) and gpus else "CPU"
        found["processes"] = f"{run.environment['world_size']} x {device}"
    return found


def told_mixture(config: Mapping[str, Any]) -> dict[str, str]:
    """The corpora of a mixture and their weights, without the folders they lie in; {} where there is none."""
    data = config.get("data")
    if not isinstance(data, Mapping) or not isinstance(mixture := data.get("mixture"), list):
        return {}
    try:
        parts = parse_mixture(mixture)
    except UserError:  # of another version
        return {}
    if all(part.weight is None for part in parts):
        told = f"{', '.join(part.name for part in parts)}, by their samples to the power of {data.get('temperature')}"
        return {"mixture": told}
    return {"mixture": ", ".join(f"{part.name} {_told_curve(part.weight)}" for part in parts if part.weight)}


def _told_curve(curve: Curve) -> str:
    return " → ".join(f"{value:g}" for value in dict.fromkeys(curve.values))


def _told_phase(phase: Any) -> str:
    """Where a phase begins and what it sets, of paths the last part."""
    if not isinstance(phase, Mapping):
        return str(phase)
    found: list[str] = []
    for key, value in phase.items():
        if key == "data.mixture":
            found += told_mixture({"data": {"mixture": value}}).values()
        elif key != "from":
            found.append(f"{key} {value.rstrip('/').rpartition('/')[2] if isinstance(value, str) else value}")
    return f"from {phase.get('from')}: {', '.join(found)}"


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
