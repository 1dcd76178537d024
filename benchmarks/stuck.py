"""A healthy run, five sick ones, and the bias by seeds: `python benchmarks/stuck.py --source BOOKS --work DIR`.

BERT-tiny by recipe=fast, and once each with one thing wrong; three seeds with the distance bias and without. Writes
results/stuck.json, losses by tokens; draws docs/images/stuck.svg; prints what the doctor says of each. A run that is
there already is not made again, so that an interrupted command goes on. `--draw` draws what the file holds.
"""

import argparse
import html
import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from cloze import drawing
from pretrain.evaluate.baseline import Baseline, held_out_baseline
from pretrain.evaluate.plateau import Evaluation, Verdict, evaluations_of, judge
from pretrain.precision import cpu_name
from pretrain.telemetry.report import read_metrics
from tests.support import ROOT, environment, later_wins

RESULTS = Path(__file__).parent / "results" / "stuck.json"
PICTURE = ROOT / "docs" / "images" / "stuck.svg"
COMMON = (
    *("recipe=fast", "steps=500", "schedule.warmup_fraction=0.1", "seed=1", "eval.every=20", "eval.max_samples=384"),
    *("model.distance_bias=[[0,1.0],[0.1,1.0],[0.8,0.01],[0.8,0]]", "checkpoint.every=0", "zero=0", "data.workers=0"),
    *("eval.predictions=0", "wandb.mode=disabled"),
)
_COLOURS = ("#2563b8", "#d4661b", "#6b7280", "#14846b", "#a83279", "#7552cc")
_STYLE = (
    "text{font:11px sans-serif;fill:#4a5058} .grid{stroke:#e1e4e8} .line{fill:none;stroke-width:2} "
    ".rule{stroke-dasharray:5 4;stroke-width:1.3}"
)
_LEGEND = 18  # pixels of each of its rows


class Run(NamedTuple):
    """One run, and what is wrong with it."""

    name: str
    told: str  # for people
    overrides: Sequence[str]
    corpus: str = "books"


RUNS = (
    Run("fast-1", "healthy", ("eval.every=50",)),
    Run("high", "rate too high", ("optim.lr=2e-2", "stop_at=140")),
    Run("low", "rate too low", ("optim.lr=1e-4", "stop_at=140")),
    Run("repeat", "a corpus of repeated lines", ("stop_at=140",), "lines"),
    Run("leak", "labels that leak", ("data.mask_share=0", "data.random_share=0", "stop_at=60")),
    Run(
        "diverge",
        "diverges",
        ("optim.lr=1", "optim.clip=0", "schedule.warmup_fraction=0", "eval.every=10", "stop_at=40"),
    ),
)
PLAIN = ("eval.every=50", "model.distance_bias=0")
SHORT = (
    *("eval.every=50", "optim=muon", "optim.lr=4e-3", "steps=400", "schedule.warmup_fraction=0.12"),
    "model.distance_bias=[[0,1.0],[0.1,1.0],[0.625,0.01],[0.625,0]]",
)
ARMS = {  # of the comparison: by what is told of it, its runs
    "the bias, 4e-3": [Run(f"fast-{seed}", "", ("eval.every=50", f"seed={seed}")) for seed in (1, 2, 3)],
    "no bias, 4e-3": [Run(f"plain-{seed}", "", (*PLAIN, f"seed={seed}")) for seed in (1, 2, 3)],
    "no bias, 2e-3": [Run("plain2e3-1", "", (*PLAIN, "optim.lr=2e-3"))],
    "a shorter bias, Muon, 4e-3, 400 steps": [Run("short-muon-1", "", SHORT)],
}


def prepare(source: Path, work: Path) -> None:
    """The corpus of books, and one of 400 documents of 60 lines each, drawn from 100 sentences of theirs."""
    if not (work / "books" / "manifest.json").exists():
        _prepare(source, work / "books", "tokenizer.vocab_size=8192")
    if not (work / "lines" / "manifest.json").exists():
        (work / "lines.jsonl").write_text(repeated_lines(source), encoding="utf-8")
        _prepare(work / "lines.jsonl", work / "lines", f"tokenizer.path={work / 'books' / 'tokenizer'}")


def repeated_lines(source: Path) -> str:
    books = subprocess.run(["zstd", "-dc", source], check=True, capture_output=True).stdout.decode().splitlines()
    texts = [" ".join(json.loads(line)["text"].split()) for line in books[:40]]
    sentences = [one for text in texts for one in re.split(r"(?<=[.!?]) +", text) if 60 <= len(one) <= 160]
    generator = random.Random(1)
    lines = generator.sample(sentences, 100)
    documents = ["\n".join(generator.choices(lines, k=60)) for _ in range(400)]
    return "".join(json.dumps({"text": document}) + "\n" for document in documents)


def _prepare(source: Path, out: Path, tokenizer: str) -> None:
    command = ["data_prep", "source=jsonl", f"source.paths=[{source}]", f"out={out}", "objective=nsp", "max_len=128"]
    more = [tokenizer, "val_fraction=0.05", "executor.workers=1"]
    subprocess.run([sys.executable, "-m", *command, *more], check=True, cwd=ROOT, env=environment())


def train(run: Run, work: Path) -> Sequence[Mapping[str, Any]]:
    """Its rows of metrics; trained where it is not there."""
    metrics = work / "runs" / run.name / "metrics.jsonl"
    if not metrics.exists():
        own = [f"data.path={work / run.corpus}", f"runs_root={work / 'runs'}", f"run={run.name}"]
        command = [sys.executable, "-m", "pretrain.train", *own, *later_wins(*COMMON, *run.overrides)]
        if subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode not in (0, 75):
            raise SystemExit(f"{run.name}: failed")
    return read_metrics(metrics)


def losses_of(run: Run, work: Path) -> dict[str, Any]:
    """In training and held out, by tokens, beside what guessing gives."""
    rows, baseline = train(run, work), held_out_baseline(work / run.corpus, 0)
    assert baseline
    accuracies = [row["eval/mlm_accuracy"] for row in rows if "eval/mlm_loss" in row]
    found = evaluations_of(rows)
    return {
        "name": run.name,
        "told": run.told,
        "overrides": list(run.overrides),
        "frequencies_loss": round(baseline.mlm_loss, 4),
        "frequencies_accuracy": round(baseline.mlm_accuracy, 4),
        "curve": [
            [one.tokens, round(one.mlm_loss, 4), round(one.train_loss or 0.0, 4), round(accuracy, 4)]
            for one, accuracy in zip(found, accuracies, strict=True)
        ],
    }


def arm_of(told: str, runs: Sequence[Run], work: Path) -> dict[str, Any]:
    """Held-out loss, accuracy and accuracy of pairs by tokens, of each seed."""
    keys = ("tokens", "eval/mlm_loss", "eval/mlm_accuracy", "eval/nsp_accuracy")
    every = [[row for row in train(run, work) if "eval/mlm_loss" in row] for run in runs]
    curves = [[[round(row[key], 4) for key in keys] for row in rows] for rows in every]
    return {"told": told, "overrides": [list(run.overrides) for run in runs], "curves": curves}


def told_ends(arm: Mapping[str, Any]) -> str:
    """A row of docs/stuck.md: means ± standard errors over seeds, of one seed its figures."""
    ends = [curve[-1] for curve in arm["curves"]]
    cells = []
    for column, scale, digits in ((1, 1.0, 3), (2, 100.0, 1), (3, 100.0, 1)):
        values = [scale * end[column] for end in ends]
        error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.{digits}f}{error}")
    return f"| {arm['told']} | {len(ends)} | {' | '.join(cells)} |"


def verdicts(run: Mapping[str, Any]) -> list[Verdict]:
    """What the doctor would say after each evaluation."""
    baseline = Baseline(run["frequencies_loss"], run["frequencies_accuracy"], 0.5)
    evaluations = [Evaluation(tokens, held_out, training) for tokens, held_out, training, _ in run["curve"]]
    found = [judge(evaluations[: number + 1], baseline) for number in range(len(evaluations))]
    return [verdict for verdict in found if verdict]


def draw(runs: Sequence[Mapping[str, Any]], most: float = 10.0) -> str:
    """Held-out losses over tokens as a picture that stands alone; what is above `most` nats is at its edge."""
    lines = [
        drawing.Line([point[0] for point in run["curve"]], [min(point[1], most) for point in run["curve"]], "eval", n)
        for n, run in enumerate(runs)
    ]
    end, frequencies = max(line.xs[-1] or 0.0 for line in lines), runs[0]["frequencies_loss"]
    lines.append(drawing.Line([0.0, end], [frequencies, frequencies], "rule", 2))
    text = drawing.lines("held-out MLM loss, nats, over tokens", lines)
    for number, colour in enumerate(_COLOURS):
        text = text.replace(f"var(--c{number})", colour)
    width, height = drawing.WIDTH, drawing.HEIGHT + _LEGEND * (-(-len(runs) // 2) + 1)
    legend = "".join(
        f'<rect x="{14 + 230 * (n % 2)}" y="{drawing.HEIGHT + 10 + _LEGEND * (n // 2)}" width="14" height="4" '
        f'fill="{_COLOURS[n]}"/><text x="{34 + 230 * (n % 2)}" y="{drawing.HEIGHT + 16 + _LEGEND * (n // 2)}">'
        f"{html.escape(run['told'])}</text>"
        for n, run in enumerate(runs)
    )
    last = drawing.HEIGHT + 16 + _LEGEND * -(-len(runs) // 2)
    legend += f'<text x="14" y="{last}">held-out MLM loss, nats, by tokens; dashed: word frequencies alone</text>'
    body = text.partition(">")[2].removesuffix("</svg>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{body}{legend}</svg>\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="books-small.jsonl.zst")
    parser.add_argument("--work", type=Path, help="directory for corpora and runs")
    parser.add_argument("--draw", action="store_true", help="only draw again what the file holds")
    options = parser.parse_args()
    body = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not options.draw:
        if not (options.source and options.work):
            parser.error("--source and --work are needed, or --draw")
        prepare(options.source.resolve(), options.work.resolve())
        body["cpu"], body["common"] = cpu_name(), list(COMMON)
        body["runs"] = [losses_of(run, options.work.resolve()) for run in RUNS]
        body["arms"] = [arm_of(told, runs, options.work.resolve()) for told, runs in ARMS.items()]
        RESULTS.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(draw(body["runs"]), encoding="utf-8")
    for run in body["runs"]:
        print(f"{run['told']}: {verdicts(run)[-1].line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
