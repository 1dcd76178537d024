"""What near tokens first are worth: `python benchmarks/recipes.py --corpus shards/en --runs runs`.

BERT-mini trains under `recipe=fast` and under the plain recipe: the same samples, seed, batch, rate, warm-up, start of
weights and positions, Muon both times, but no distance bias. One core, one thread, one after the other; a run that
is finished in `--runs` is not run again. Prints both curves, writes results/recipes.json and docs/images/recipes.svg.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.precision import cpu_name
from pretrain.telemetry.metrics_file import Row
from pretrain.telemetry.report import read_metrics
from tests.support import ROOT, environment

RESULTS = Path(__file__).parent / "results" / "recipes.json"
PICTURE = ROOT / "docs" / "images" / "recipes.svg"
COMMON = (
    *("recipe=fast", "model=mini", "optim=muon", "optim.lr=2e-3", "schedule.warmup_fraction=0.028", "zero=0"),
    *("eval.every=200", "eval.max_samples=2000", "data.workers=0", "wandb.mode=disabled"),
)
RECIPES = {
    "fast": "model.distance_bias=[[0,1.0],[0.029,1.0],[0.235,0.01],[0.235,0]]",
    "plain": "model.distance_bias=0",
}
COLOURS = {"fast": "#b5462f", "plain": "#5b6b7b"}
FIGURES = ("mlm_loss", "mlm_accuracy", "nsp_accuracy")


def train(recipe: str, options: argparse.Namespace) -> list[Row]:
    """Train to the end; the lines of metrics."""
    run = f"{recipe}-{options.seed}"
    own = [f"data.path={options.corpus}", f"runs_root={options.runs}", f"run={run}", RECIPES[recipe]]
    command = [sys.executable, "-m", "pretrain.train", *COMMON, *own, f"seed={options.seed}", f"steps={options.steps}"]
    core = {max(os.sched_getaffinity(0))}
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), preexec_fn=lambda: os.sched_setaffinity(0, core))
    return read_metrics(options.runs / run / "metrics.jsonl")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of a run: its minutes, by the clock, and what it had at each evaluation."""
    steps = rows[-1]["step"] - rows[0]["step"]
    found = [row for row in rows if "eval/mlm_loss" in row]
    return {
        "minutes": round((rows[-1]["time"] - rows[0]["time"]) / 60 * rows[-1]["step"] / steps, 1),
        "curve": [
            {key: row[key] for key in ("step", "tokens")} | {key: round(row[f"eval/{key}"], 4) for key in FIGURES}
            for row in found
        ],
        "frequencies_loss": round(found[-1]["eval/frequencies_loss"], 4),
        "majority_nsp_accuracy": round(found[-1]["eval/majority_nsp_accuracy"], 4),
    }


def draw(runs: Mapping[str, Mapping[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "cloze", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
        for name, run in runs.items():
            tokens = [row["tokens"] / 1e6 for row in run["curve"]]
            losses = [row["mlm_loss"] for row in run["curve"]]
            axes.plot(tokens, losses, color=COLOURS[name], marker="o", markersize=3)
            axes.annotate(f"{name}: {losses[-1]:.2f}", (tokens[-1], losses[-1]), (4, 0), textcoords="offset points")
        floor = next(iter(runs.values()))["frequencies_loss"]
        axes.axhline(floor, color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate("word frequencies alone", (0, floor), (2, 3), textcoords="offset points", color="#777777")
        axes.set(xlabel="million tokens", ylabel="held-out MLM loss, nats", xlim=(0, None))
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="prepared with objective=nsp max_len=128")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    options.corpus, options.runs = options.corpus.resolve(), options.runs.resolve()
    runs = {recipe: summary(train(recipe, options)) for recipe in RECIPES}
    body = {"cpu": cpu_name(), "threads": 1, "seed": options.seed, "steps": options.steps, "runs": runs}
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    draw(runs)
    print("step     tokens  " + "  ".join(f"{name:>22}" for name in runs))
    for rows in zip(*(run["curve"] for run in runs.values()), strict=True):
        told = (f"{row['mlm_loss']:.3f} {row['mlm_accuracy']:6.1%} {row['nsp_accuracy']:8.1%}" for row in rows)
        print(f"{rows[0]['step']:5d} {rows[0]['tokens']:11,d}  " + "  ".join(told))
    ends = [run["curve"][-1]["mlm_loss"] for run in runs.values()]
    minutes = ", ".join(f"{name} {run['minutes']:.1f} minutes" for name, run in runs.items())
    print(f"{ends[1] - ends[0]:.3f} nats between them; {minutes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
