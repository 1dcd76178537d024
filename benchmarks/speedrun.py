"""How fast a held-out loss can be reached: `python benchmarks/speedrun.py --source books.jsonl.zst`.

A record is a training command of BERT-tiny whose last evaluation has an MLM loss of 5.0 nats or less (attention whole,
no bias; word frequencies alone: 6.5), on books.jsonl.zst, MLM and sentence pairs, 8,192 words, samples of up to 128
tokens, one process with one thread, one seed. What counts: tokens (the same on any machine), then the seconds of
processor time of the whole command, start and evaluation included (clock time is that of a machine that others use).
Each record stands here with its idea, in the order in which they were set; the ablation is the record before it, given
the new record's steps: what the idea alone is worth. --record NAME runs one, --ablate its ablation, --try KEY=VALUE ...
what may become one. docs/speedrun.md is the table of results/speedrun.json.
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
TARGET = 5.0  # nats per masked token, held out
COMMON = (
    "recipe=fast", "zero=0", "precision=fp32", "seed=1", "data.workers=0", "wandb.mode=disabled", "log.every=25",
    "eval.every=100", "eval.max_samples=2000", "eval.predictions=0", "checkpoint.every=0",
)  # fmt: skip


class Record(NamedTuple):
    """What is new in a record, how many steps it takes, and the rest of its command."""

    idea: str
    steps: int
    overrides: tuple[str, ...]
    bias: bool = True  # the slope 1.0 for 50 steps, then falling to 0.01 at step 400, then none

    def command(self, steps: int) -> list[str]:
        """For so many steps; what is told in steps stays where it is."""
        points = f"[[0,1],[{50 / steps:.5f},1],[{400 / steps:.5f},0.01],[{400 / steps:.5f},0]]" if self.bias else "0"
        return [
            *(f"steps={steps}", f"schedule.warmup_fraction={48 / steps:.5f}", f"model.distance_bias={points}"),
            *self.overrides,
        ]


RECORDS = {
    "positions": Record(
        "weights drawn by width, positions that start as sinusoids", 2100, ("optim.lr=2e-3",), bias=False
    ),
    "near_first": Record("near tokens first: a distance bias that is annealed away", 600, ("optim.lr=2e-3",)),
    "rate": Record("twice the rate", 500, ("optim.lr=4e-3",)),
    "muon": Record("Muon in place of AdamW", 480, ("optim=muon", "optim.lr=4e-3")),
}


def prepare(source: Path, out: Path) -> None:
    if not (out / "manifest.json").exists():
        command = [
            "data_prep", "source=jsonl", f"source.paths=[{source}]", f"out={out}", "objective=nsp", "max_len=128",
            "tokenizer.vocab_size=8192",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", *command], check=True, cwd=ROOT, env=environment())


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
        "steps": int(last["step"]),
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
    parser.add_argument("--ablate", action="store_true", help="each record's ablation beside it")
    parser.add_argument("--try", nargs="+", metavar="KEY=VALUE", dest="attempt", help="what may become a record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        prepare(options.source, work / "books")
        if options.attempt:
            print(json.dumps(attempt(f"try-{int(time.time())}", options.attempt, work / "books", work / "runs")))
            return 0
        missed = 0
        body = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
        for name in options.record or RECORDS:
            record, row = RECORDS[name], body["rows"].get(name, {})
            row |= attempt(name, record.command(record.steps), work / "books", work / "runs") | {"idea": record.idea}
            before = list(RECORDS).index(name) - 1
            if options.ablate and before >= 0:
                without = list(RECORDS.values())[before].command(record.steps)
                row["without"] = attempt(f"{name}-without", without, work / "books", work / "runs")["loss"]
            print(json.dumps(row), flush=True)
            if row["loss"] > TARGET:
                print(f"{name}: {row['loss']} nats, no record: the target is {TARGET}", file=sys.stderr)
                missed = 1
                continue
            body["rows"][name] = row
            rows = {one: body["rows"][one] for one in RECORDS if one in body["rows"]}
            RESULTS.write_text(json.dumps({"cpu": cpu_name(), "target": TARGET, "rows": rows}, indent=1) + "\n")
    return missed


if __name__ == "__main__":
    sys.exit(main())
