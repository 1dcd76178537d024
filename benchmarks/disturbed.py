"""A run's life in one picture: `python benchmarks/disturbed.py --source books-small.jsonl.zst`.

BERT-mini trains twice on the same samples. Once undisturbed, one process, ZeRO 1. The other run is killed three times
(SIGKILL to every process, wherever it is), goes on by the same command under other numbers of processes and other ZeRO
stages, and ends. Prints how far the two curves are apart, writes results/disturbed.json and docs/images/disturbed.svg.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pretrain.precision import cpu_name
from pretrain.telemetry.report import read_metrics
from tests.support import ROOT, environment

RESULTS = Path(__file__).parent / "results" / "disturbed.json"
PICTURE = ROOT / "docs" / "images" / "disturbed.svg"
STEPS = 200
COMMON = (
    *("recipe=fast", "model=mini", "optim.lr=1e-3", f"steps={STEPS}", "global_batch_size=16", "micro_batch_size=8"),
    *("schedule.warmup_fraction=0.1", "log.every=5", "eval.every=0", "checkpoint.every=20", "data.workers=0"),
    *("wandb.mode=disabled", "seed=1"),
)


class Life(NamedTuple):
    """One start of the disturbed run."""

    procs: int
    zero: int
    killed_at: int | None  # step that stands in metrics.jsonl when the kill comes


LIVES = (Life(1, 1, 45), Life(2, 1, 90), Life(2, 3, 145), Life(1, 2, None))


def prepare(source: Path, out: Path) -> None:
    command = ["data_prep", "source=jsonl", f"source.paths=[{source}]", f"out={out}", "objective=nsp", "max_len=128"]
    more = ["tokenizer.vocab_size=8192", "executor.workers=2"]
    subprocess.run([sys.executable, "-m", *command, *more], check=True, cwd=ROOT, env=environment())


def start(folder: Path, run: str, life: Life) -> int:
    """Train until the kill, or to the end; the step of the last line of metrics."""
    own = [f"data.path={folder / 'shards'}", f"runs_root={folder}", f"run={run}", f"zero={life.zero}"]
    command = [sys.executable, "-m", "launch", f"procs={life.procs}", *own, *COMMON]
    metrics = folder / run / "metrics.jsonl"
    with psutil.Popen(command, cwd=ROOT, env=environment()) as process:
        while process.poll() is None:
            if life.killed_at is not None and last_step(metrics) >= life.killed_at:
                for one in [*process.children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
                break
            time.sleep(0.05)
    if life.killed_at is None and process.returncode:
        raise SystemExit(f"{run}: exit code {process.returncode}")
    return last_step(metrics)


def last_step(metrics: Path) -> int:
    return (
        max((int(row["step"]) for row in read_metrics(metrics) if "step" in row), default=0) if metrics.exists() else 0
    )


def curve(metrics: Path) -> dict[int, float]:
    """MLM loss by step; of steps that were trained twice the later."""
    return {int(row["step"]): row["train/mlm_loss"] for row in read_metrics(metrics) if "train/mlm_loss" in row}


def draw(calm: Mapping[int, float], disturbed: Mapping[int, float], kills: list[dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cloze", "font.family": "sans-serif", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        axes.plot(
            *zip(*calm.items(), strict=True), color="#b8b8b8", linewidth=5, label="undisturbed: 1 process, ZeRO 1"
        )
        axes.plot(*zip(*disturbed.items(), strict=True), color="#b5462f", linewidth=1.2, label="killed three times")
        ends = [kill["step"] for kill in kills] + [STEPS]
        for life, begin, end in zip(LIVES, [0, *ends[:-1]], ends, strict=True):
            processes = f"{life.procs} process{'es' if life.procs > 1 else ''}"
            axes.text((begin + end) / 2, max(calm.values()), f"{processes}\nZeRO {life.zero}", ha="center", va="top")
        for kill in kills:
            axes.axvline(kill["step"], color="#b5462f", linewidth=0.8, linestyle=":")
        axes.set(xlabel="step (dotted: SIGKILL)", ylabel="MLM loss, nats, in training")
        axes.legend(frameon=False, loc="center right")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="books-small.jsonl.zst")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options.source.resolve(), folder / "shards")
        start(folder, "calm", Life(1, 1, None))
        kills = []
        for life in LIVES:
            step = start(folder, "disturbed", life)
            if life.killed_at is not None:
                kills.append({"step": step, "procs": life.procs, "zero": life.zero})
        calm, disturbed = (curve(folder / run / "metrics.jsonl") for run in ("calm", "disturbed"))
    if calm.keys() != disturbed.keys():
        raise SystemExit(f"steps differ: {sorted(calm.keys() ^ disturbed.keys())}")
    apart = max(abs(calm[step] - disturbed[step]) for step in calm)
    body = {
        "cpu": cpu_name(), "steps": STEPS, "kills": kills, "lives": [life._asdict() for life in LIVES],
        "largest_difference": apart, "calm": [round(x, 5) for x in calm.values()],
        "disturbed": [round(x, 5) for x in disturbed.values()],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(body) + "\n")
    draw(calm, disturbed, kills)
    print(f"killed at steps {', '.join(str(kill['step']) for kill in kills)}; largest difference {apart:.2e} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
