"""The page of a fine-tuned model: one self-contained file of HTML that needs no network and no script to be read.

Its score beside guessing, random weights and other settings, what it takes for what, what it gets wrong, the worst
first. Fine-tuning writes it beside the model, `finetune.report` anew.
"""

import json
import math
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloze import drawing
from cloze.errors import DiskError, UserError
from cloze.files import json_object, write_whole
from cloze.ownership import page_mark, require_own_file
from cloze.templates import render
from finetune.card import changed_settings, data_rows
from finetune.config import flat, saved
from finetune.resume import metrics
from finetune.tables import legend, of_seeds, shown
from finetune.tried import grid_of

NAME = "report.html"
PREDICTIONS = "dev-predictions.jsonl"  # rows of data.dev, each with its answer and how wrong that is
LOSSES = "losses.json"  # of every seed: [[step, loss], …]
PAGE_MARK = page_mark("report on a fine-tuned model")

_SHOWN = 50  # examples
_LETTERS = 400  # of an example's text
_MOST_LABELS = 20  # in a matrix
_MOST_BESIDE = 200  # models


class Figure(NamedTuple):
    """One thing that the first screen says."""

    name: str
    value: str
    beside: str = ""


class Verdict(NamedTuple):
    """Whether it was worth it."""

    line: str
    kind: str  # a class of the style sheet


class Bar(NamedTuple):
    """A score beside others."""

    name: str
    value: str
    percent: float
    kind: str  # a class of the style sheet


class Cell(NamedTuple):
    """How often one label was taken for another."""

    times: int
    percent: float  # of the right label's
    right: bool


class Confusion(NamedTuple):
    """Right labels down, answers across."""

    labels: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str


class Listed(NamedTuple):
    """A table with a line above or below."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def write_page(folder: Path, out: Path, page: Path | None = None) -> Path:
    """Write the page of the model in `folder`, which is or becomes `out`. Raises `UserError`, `DiskError`."""
    body = metrics(folder)
    if body is None:
        raise UserError(f"{folder}: holds no model that `python -m finetune` wrote; name its out")
    page = page or folder / NAME
    require_own_file(page, (PAGE_MARK,), "--out ")
    try:
        write_whole(page, _page(folder, out, body).encode())
    except OSError as error:
        raise DiskError(f"{page}: {error.strerror}; free space or choose another --out") from error
    return page


def beside(out: Path, body: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The metrics.json of the models beside `out` that learned the same task, scored on the same data.dev."""
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(out.parent.glob("*/metrics.json"))[:_MOST_BESIDE]:
        other = metrics(path.parent) if path.parent.name != out.name else None
        if other and other["config"].get("task") == body["config"]["task"] and _of_dev(other) == _of_dev(body):
            found[path.parent] = other
    return found


def _of_dev(body: Mapping[str, Any]) -> Any:
    data = body["config"].get("data", {})
    return body.get("sha256", {}).get("data.dev", (data.get("dev"), data.get("train"), data.get("dev_fraction")))


def _page(folder: Path, out: Path, body: Mapping[str, Any]) -> str:
    config, score = saved(body["config"]), body["score"]
    others = beside(out, body)
    rows, losses = _rows(folder / PREDICTIONS), json_object(folder / LOSSES)
    own, random = of_seeds(body, score), _random_weights(body, others)
    verdicts = {str(seed): wrong for seed, wrong in body.get("verdicts", {}).items()}
    trouble = [f"seed {seed}: the model {wrong}; more epochs, another optim.lr or another model may help"
               for seed, wrong in verdicts.items()]  # fmt: skip
    seeds = [(seed, number % 8) for number, seed in enumerate(losses)]
    drawn = [drawing.Line(*_pairs(losses[seed]), "train", colour) for seed, colour in seeds]
    command = ("python", "-m", "finetune.predict", str(out), "texts.txt", "labels.tsv")
    return render(
        __file__,
        "report.html",
        mark=PAGE_MARK,
        title=f"Cloze: {out.name}",
        name=out.name,
        about=f"{config.task}, from {Path(config.model).name}"
        + (" at random" if config.init.value == "random" else ""),
        trouble=trouble,
        verdict=_verdict(own, random, is_bad=str(body["model_of_seed"]) in verdicts),
        command=shlex.join(command),
        figures=[*_figures(body, own, random)],
        score=score,
        bars=[*_bars(body, own, random)],
        confusion=_confusion(rows, body.get("labels") or ()),
        errors=_errors(rows),
        grid=_grid({out: body, **others}) if others else None,
        losses=drawing.lines("loss", drawn) if losses else "",
        seeds=seeds,
        scores=_scores(body),
        data=[*data_rows(config, body)],
        settings=[(key.strip("`"), value) for key, value in changed_settings(config)],
        written=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
    )


def _best(body: Mapping[str, Any]) -> Any:
    """The key of the kept seed: numbers of JSON are texts."""
    return next(seed for seed in body["by_seed"] if str(seed) == str(body["model_of_seed"]))


def _verdict(own: Sequence[float], random: Sequence[float], *, is_bad: bool) -> Verdict:
    if is_bad:
        return Verdict("of little worth", "bad")
    if random and statistics.median(own) - statistics.median(random) <= _error(own, random):
        return Verdict("no better than random weights", "stopped")
    return Verdict("better than guessing and random weights" if random else "better than guessing", "finished")


def _error(own: Sequence[float], random: Sequence[float]) -> float:
    """The standard error of the difference of two means; 0 where one of them is of one seed."""
    if min(len(own), len(random)) < 2:
        return 0.0
    return math.hypot(*(statistics.stdev(scores) / math.sqrt(len(scores)) for scores in (own, random)))


def _figures(body: Mapping[str, Any], own: Sequence[float], random: Sequence[float]) -> Iterator[Figure]:
    score, num_seeds = body["score"], len(body["by_seed"])
    guess, kept = body["guessing"][score], body["by_seed"][_best(body)][score]
    yield Figure(f"{score}, this model", shown(score, [kept]), f"guessing gives {shown(score, [guess])}")
    if num_seeds > 1:
        median, _, mean = shown(score, own).partition(" ")
        yield Figure(f"{score}, {num_seeds} seeds", median, f"the median; mean {mean.strip('()')}")
    if random:
        median, _, mean = shown(score, random).partition(" ")
        gain = f"pretraining gives {100 * (statistics.median(own) - statistics.median(random)):+.1f}"
        yield Figure("random weights", median, f"mean {mean.strip('()')}; {gain}" if mean else gain)
    yield Figure("examples", f"{body['train_examples']:,}", f"{body.get('dev_examples', 0):,} to score on")
    config = body["config"]
    yield Figure(
        "learning rate", f"{config['optim']['lr']:g}", f"batch {config['batch_size']}, {config['epochs']} epochs"
    )


def _bars(body: Mapping[str, Any], own: Sequence[float], random: Sequence[float]) -> Iterator[Bar]:
    score = body["score"]
    guessing, mine = [body["guessing"][score]], "this model" + (f", {len(own)} seeds" if len(own) > 1 else "")
    for name, scores in ((mine, own), ("random weights", random), ("guessing the commonest", guessing)):
        if scores:
            percent = max(0.0, min(100.0, 100 * statistics.median(scores)))
            yield Bar(name, shown(score, scores), percent, "own" if scores is own else "other")


def _random_weights(body: Mapping[str, Any], others: Mapping[Path, Mapping[str, Any]]) -> list[float]:
    """The scores of the model beside this one that differs in its weights at the beginning alone; [] without one."""
    if body["config"].get("init") == "random":
        return []
    mine = _settings(body)
    for other in others.values():
        if other["config"].get("init") == "random" and _settings(other) == mine:
            return of_seeds(other, body["score"])
    return []


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(body["config"]) if not key.startswith(("init", "out", "log.", "wandb."))}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def _confusion(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Confusion | None:
    """None where answers are no labels. Of tags, those of single words, without where in an entity they stand."""
    tagged = bool(rows) and "tags" in rows[0]
    if not labels or not rows or not (tagged or "label" in rows[0]):
        return None
    pairs: Counter[tuple[str, str]] = Counter()
    for row in rows:
        right, given = (row["tags"], row["predicted"]) if tagged else ([row["label"]], [row["predicted"]])
        pairs.update((_kind(a), _kind(b)) if tagged else (a, b) for a, b in zip(right, given, strict=True))
    totals: Counter[str] = Counter()
    for (right, _), count in pairs.items():
        totals[right] += count
    known = list(dict.fromkeys(map(_kind, labels) if tagged else labels))
    kept = {label for label, _ in totals.most_common(_MOST_LABELS)} if len(known) > _MOST_LABELS else {*known}
    known = [label for label in known if label in kept]
    table = [
        (right, [Cell(pairs[right, given], 70 * pairs[right, given] / max(1, totals[right]), right == given)
                 for given in known])
        for right in known
    ]  # fmt: skip
    what = "tags of words" if tagged else "examples"
    note = f"{what} of data.dev: the right label down, the answer across"
    return Confusion(
        known,
        table,
        note
        + (f"; the {len(known)} commonest of {len(labels)} labels" if len(known) < len(labels) and not tagged else ""),
    )


def _kind(tag: str) -> str:
    """PER of B-PER."""
    return tag.partition("-")[2] or tag


def _errors(rows: Sequence[Mapping[str, Any]]) -> Listed | None:
    """None where nobody says how wrong an answer is."""
    if not rows or "wrong" not in rows[0]:
        return None
    wrong = sorted((row for row in rows if row["wrong"] > 0), key=lambda row: -row["wrong"])
    number = isinstance(rows[0].get("label"), int | float)
    measure = "off by" if number else "how sure" if "label" in rows[0] else "how wrong"
    told = [(*_told(row), f"{row['wrong']:.3g}" if number else f"{row['wrong']:.0%}") for row in wrong[:_SHOWN]]
    note = f"{len(wrong):,} of {len(rows):,}" + (f"; the first {_SHOWN} of them" if len(wrong) > _SHOWN else "")
    return Listed(("text", "right", "answer", measure), told, note)


def _told(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(text, what is right, what was answered) of an example."""
    if "tags" in row:
        pairs = [(w, a, b) for w, a, b in zip(row["words"], row["tags"], row["predicted"], strict=True) if a != b]
        right, given = (", ".join(f"{w} {tag}" for w, *tags in pairs for tag in [tags[side]]) for side in (0, 1))
        return _cut(" ".join(row["words"])), right, given
    if "question" in row:
        return _cut(row["question"]), " / ".join(row["answers"]) or "no answer", str(row["predicted"]) or "no answer"
    texts = [str(value) for key, value in row.items() if key.startswith("sentence")]
    right, given = (f"{one:.4g}" if isinstance(one, float) else str(one) for one in (row["label"], row["predicted"]))
    return _cut(" — ".join(texts)), right, given


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…"


class Tried(NamedTuple):
    """The settings that were tried: a table, and a drawing over the first number that varies."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    key: str
    svg: str


def _grid(bodies: Mapping[Path, Mapping[str, Any]]) -> Tried:
    grid = grid_of(bodies)
    head = ["out", *grid.head[1:]]  # one of the keys is model
    for number, key in enumerate(grid.keys):
        values, names = [own[number] for own in grid.values], [path.name for path in grid.paths]
        if svg := drawing.over_key(f"{grid.score} by {key}", values, grid.scores, names, percent=True):
            return Tried(head, grid.rows, key, svg)
    return Tried(head, grid.rows, "", "")


def _pairs(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _scores(body: Mapping[str, Any]) -> Listed:
    kept, several = body["by_seed"][_best(body)], len(body["by_seed"]) > 1
    head = ("score, %", "this model", *(["seeds"] if several else []), "guessing")
    rows = []
    for name, value in kept.items():
        every = [shown(name, of_seeds(body, name))] if several else []
        rows.append((name, shown(name, [value]), *every, shown(name, [body["guessing"][name]])))
    note = f"Errors as they are. This model is that of seed {body['model_of_seed']}"
    return Listed(head, rows, note + (f"; seeds: {legend(len(body['by_seed']))}" if several else ""))
