"""How fast a held-out loss can be reached: `python benchmarks/speedrun.py --source books.jsonl.zst --record NAME`.

A record is a training command of BERT-tiny whose last evaluation has an MLM loss of 5.5 nats or less (all tokens of the
held-out samples attend to each other; word frequencies alone: 6.5), on books.jsonl.zst, 8,192 words, samples of up to
128 tokens, one process with one thread, one seed. What counts: tokens (the same on any machine), then the seconds of
processor time of the whole command, start and evaluations included (clock time is that of a machine that others use).
Each record stands here with its idea, in the order in which they were set; without --record all are run. A run that
misses the target is no record, and says so. docs/speedrun.md is the table; results go to results/speedrun.json.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.precision import cpu_name
from pretrain.telemetry.report import read_metrics
from tests.support import ROOT, environment

RESULTS = Path(__file__).parent / "results" / "speedrun.json"
TARGET = 5.5  # nats per masked token, held out
COMMON = (
    *(
        "model=tiny",
        "zero=0",
        "precision=fp32",
        "global_batch_size=64",
        "micro_batch_size=32",
        "optim.weight_decay=0.01",
    ),
    *(
        "optim.clip=1",
        "seed=1",
        "data.workers=0",
        "wandb.mode=disabled",
        "model.dropout=0",
        "model.attention_dropout=0",
    ),
    *("schedule=linear", "schedule.final_fraction=0", "log.every=50", "eval.every=0", "eval.max_samples=2000"),
    "checkpoint.every=0",
)


class Record(NamedTuple):
    """What is new in a record, and its training command."""

    idea: str
    overrides: tuple[str, ...]


_BIAS = "model.distance_bias=[[0,1],[0.083,1],[0.667,0.01],[0.667,0]]"  # 1.0, then falling to nothing
RECORDS = {
    "width": Record(
        "weights drawn by width, positions that start as sinusoids",
        ("steps=1000", "optim.lr=2e-3", "schedule.warmup_fraction=0.025"),
    ),
    "near_first": Record(
        "a distance bias that is annealed away: near tokens first",
        ("steps=480", "optim.lr=2e-3", "schedule.warmup_fraction=0.08", _BIAS),
    ),
    "rate": Record("twice the rate", ("steps=380", "optim.lr=4e-3", "schedule.warmup_fraction=0.08", _BIAS)),
}


def prepare(source: Path, out: Path) -> None:
    if not (out / "manifest.json").exists():
        command = [
            "data_prep",
            "source=jsonl",
            f"source.paths=[{source}]",
            f"out={out}",
            "objective=nsp",
            "max_len=128",
        ]
        more = ["tokenizer.vocab_size=8192", "executor.workers=2"]
        subprocess.run([sys.executable, "-m", *command, *more], check=True, cwd=ROOT, env=environment())


def attempt(name: str, overrides: Sequence[str], corpus: Path, folder: Path) -> dict[str, Any]:
    """Train from nothing to the end in a process of its own; the row of results."""
    command = [
        *(sys.executable, str(ROOT / "pretrain" / "train.py"), f"data.path={corpus}", f"runs_root={folder}"),
        *(f"run={name}", *COMMON, *overrides),
    ]
    began, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, env=environment())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    last = [row for row in read_metrics(folder / name / "metrics.jsonl") if "eval/mlm_loss" in row][-1]
    (weights,) = (folder / name / "checkpoints").glob("step-*/model.safetensors")
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "record": name,
        "loss": round(last["eval/mlm_loss"], 4),
        "accuracy": round(last["eval/mlm_accuracy"], 4),
        "tokens": int(last["tokens"]),
        "cpu_seconds": round(used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime, 1),
        "seconds": round(time.monotonic() - began, 1),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest()[:16],
        "commit": subprocess.run(commit, check=False, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="books.jsonl.zst")
    parser.add_argument("--record", choices=RECORDS, action="append", help="all where none is named")
    parser.add_argument("--work", type=Path, help="keeps the corpus and the runs here")
    parser.add_argument(
        "--try", nargs="+", metavar="KEY=VALUE", dest="attempt", help="overrides that may become a record"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        prepare(options.source, work / "books")
        if options.attempt:
            print(json.dumps(attempt(f"try-{int(time.time())}", options.attempt, work / "books", work / "runs")))
            return 0
        missed = False
        body = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
        rows = {row["record"]: row for row in body["rows"]}
        for name in options.record or RECORDS:
            row = attempt(name, RECORDS[name].overrides, work / "books", work / "runs")
            print(json.dumps(row), flush=True)
            if row["loss"] > TARGET:
                print(f"{name}: {row['loss']} nats, no record: the target is {TARGET}", file=sys.stderr)
                missed = True
                continue
            rows[name] = row
            body = {"cpu": cpu_name(), "target": TARGET, "rows": [rows[one] for one in RECORDS if one in rows]}
            RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
