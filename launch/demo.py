"""`python -m launch.demo`: the whole of Cloze on this machine in minutes, as `make demo` runs it.

Docstrings -> shards -> verified -> pretrained -> held-out evaluation -> Hugging Face model -> predictions -> report.
Every step is a command that a user could type; this module prints and runs them, and at the end holds the model against
what guessing would reach. Run again, it goes on where it stopped.
"""

import math
import shlex
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from cloze import cli, ownership
from cloze.arrival import later_wins
from cloze.corpus.manifest import NAME as MANIFEST_NAME
from cloze.errors import ExitCode, TrainingError, UserError
from cloze.log import log, verbosity
from launch.command import this_machine
from launch.demo_screen import draw_curve, fill_masks, listed, nearest_words
from pretrain.config import TrainConfig
from pretrain.evaluate.baseline import Baseline, held_out_baseline
from pretrain.telemetry.metrics_file import METRICS_NAME
from pretrain.telemetry.report import REPORT_NAME, Table, duration, read_metrics, write_report

SENTENCES = (
    "Return a new [MASK] with the same values.",
    "If the file does not exist, an [MASK] is raised.",
    "The default [MASK] is None.",
    "This [MASK] should not be called directly.",
    "The number of [MASK] in the input array.",
)
WORDS = ("list", "returns", "error", "two", "string", "new")  # those that are tokens are shown with their nearest
_OWN = ("recipe=fast",)  # what a user's own text is trained with


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the demo on one kind of machine."""

    prep: tuple[str, ...]
    train: tuple[str, ...]
    mlm_margin: float  # nats that the held-out MLM loss must lie below guessing by token frequency
    nsp_margin: float  # how far held-out NSP accuracy must lie above always saying the more frequent label


ON_CPU = Plan(
    prep=("max_len=64", "tokenizer.vocab_size=8192", "tokenizer.sample_mib=4", "val_fraction=0.02"),
    train=(
        *(
            "recipe=fast",
            "expect.max_len=[64]",
            "steps=1200",
            "model.distance_bias=[[0,1.0],[0.07,1.0],[0.5,0.01],[0.5,0]]",
        ),
        *("log.every=50", "eval.every=400", "eval.max_samples=2000", "checkpoint.every=400"),
    ),
    mlm_margin=1.5,
    nsp_margin=0.05,
)
ON_GPU = Plan(
    prep=("max_len=128", "tokenizer.vocab_size=16384", "val_fraction=0.02", "passes=4"),
    train=(
        *("model=base", "precision=bf16", "global_batch_size=512", "micro_batch_size=64", "steps=2000"),
        *("optim.lr=4e-4", "schedule.warmup_fraction=0.1"),
        *("log.every=20", "eval.every=500", "eval.max_samples=4000", "checkpoint.every=1000"),
    ),
    mlm_margin=1.0,
    nsp_margin=0.05,
)


class Paths(NamedTuple):
    """Where the demo keeps what it makes, relative to the working directory."""

    shards: Path = Path("shards/demo")
    run: Path = Path("runs/demo")
    model: Path = Path("out/demo")


def last_evaluation(run: Path) -> dict[str, float]:
    """The newest held-out evaluation of a run. Raises `UserError` if there is none."""
    for row in reversed(read_metrics(run / METRICS_NAME)):
        if "eval/mlm_loss" in row:
            return {name: value for name, value in row.items() if name.startswith("eval/")}
    raise UserError(f"{run / METRICS_NAME}: holds no evaluation; start over with  make demo DEMO=--fresh")


class Demo:
    """Runs the steps one after another and keeps their times."""

    def __init__(self, plan: Plan, overrides: Sequence[str], paths: Paths) -> None:
        self._plan, self._overrides, self._paths = plan, tuple(overrides), paths
        self._seconds: list[tuple[str, float]] = []

    def run(self) -> int:
        """All steps; the exit code of the first that fails."""
        plan, paths = self._plan, self._paths
        train = (f"data.path={paths.shards}", f"run={paths.run.name}", f"runs_root={paths.run.parent}", "zero=1")
        steps: list[tuple[str, tuple[str, ...]]] = [
            ("prepare docstrings as shards", ("data_prep", "source=docstrings", f"out={paths.shards}", *plan.prep)),
            ("verify the shards", ("data_prep.verify", str(paths.shards))),
            ("pretrain with DeepSpeed ZeRO-1", ("launch", *later_wins([*train, *plan.train, *self._overrides]))),
            ("export to Hugging Face", ("pretrain.export", str(paths.run), str(paths.model), "--force")),
        ]
        if (paths.shards / MANIFEST_NAME).exists():
            print(f"\n{paths.shards} is prepared already (--fresh starts over)")
            del steps[0]
        for title, command in steps:
            code = self._step(title, command)
            if code:
                log.info(f"\ndemo: stopped: {title}: exit code {code}")
                return code
        return self._evaluate()

    def _step(self, title: str, command: Sequence[str]) -> int:
        number = len(self._seconds) + 1
        print(f"\n=== {number}. {title}\n$ {shlex.join(['python', '-m', *command])}", flush=True)
        start = time.monotonic()
        code = run_child([sys.executable, "-m", *command, *verbosity()])
        self._seconds.append((title, time.monotonic() - start))
        return code

    def _evaluate(self) -> int:
        """Evaluation against the baseline, predictions, report. Raises `TrainingError` if guessing is as good.

        A training of fewer steps than planned is told so instead.
        """
        config = self._config(self._overrides)
        reached = last_evaluation(self._paths.run)
        guessing = held_out_baseline(self._paths.shards, config.eval.max_samples)
        if guessing is None:
            raise UserError(f"{self._paths.shards}: has no held-out samples; prepare it with val_fraction")
        comparison = [
            ("MLM loss, nats", f"{guessing.mlm_loss:.3f}", f"{reached['eval/mlm_loss']:.3f}"),
            ("MLM accuracy", f"{guessing.mlm_accuracy:.1%}", f"{reached['eval/mlm_accuracy']:.1%}"),
            ("NSP accuracy", f"{guessing.nsp_accuracy:.1%}", f"{reached['eval/nsp_accuracy']:.1%}"),
        ]
        print(f"\n=== Held-out evaluation\n{'':16}{'guessing':>10}{'model':>10}")
        for name, guess, value in comparison:
            print(f"{name:16}{guess:>10}{value:>10}")
        rows = read_metrics(self._paths.run / METRICS_NAME)
        print("\n=== MLM loss: * in training, o held out", *draw_curve(rows, guessing), sep="\n")
        if left := reached.get("eval/left_plateau_tokens"):
            print(f"off the plateau of word frequencies after {left / 1e6:.1f}M tokens")
        predictions = [
            (one.sentence, listed(one.trained), listed(one.random)) for one in fill_masks(self._paths.model, SENTENCES)
        ]
        print("\n=== What the model fills in (in brackets: random weights)")
        for sentence, trained, random in predictions:
            print(f"{sentence}\n    {trained}    [{random}]")
        near = [
            (one.word, ", ".join(one.trained), ", ".join(one.random)) for one in nearest_words(self._paths.model, WORDS)
        ]
        print("\n=== Nearest words (in brackets: random weights)")
        for word, trained, random in near:
            print(f"{word:8} {trained}    [{random}]")
        sections = [
            Table("Held-out, against guessing", ("", "guessing by frequency", "model"), comparison),
            Table("What the model fills in", ("sentence", "the model", "random weights"), predictions),
            Table("Nearest words", ("word", "in the model", "in random weights"), near),
        ]
        report = write_report([self._paths.run], self._paths.run / REPORT_NAME, sections)
        print("\n=== Done")
        for title, seconds in self._seconds:
            print(f"{title:32}{duration(seconds):>14}")
        print(f"model   {self._paths.model}\nreport  {report}")
        print(self._next(rows), flush=True)
        return self._passed(reached, guessing)

    def _next(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """What to do with one's own text, and how long it takes at the speed of this run."""
        speeds = [row["throughput/tokens_per_second"] for row in rows if "throughput/tokens_per_second" in row]
        own = cli.compose("train", TrainConfig, ["run=mine", "data.path=shards/mine", *_OWN])
        tokens = own.steps * own.global_batch_size * max(own.expect.max_len)
        about = f"  # about {duration(tokens / statistics.median(speeds))} here" if speeds else ""
        return (
            "your own text:\n"
            "  python -m data_prep source=text 'source.paths=[FOLDER/*.txt]' out=shards/mine\n"
            f"  python -m launch data.path=shards/mine run=mine {shlex.join(_OWN)}{about}"
        )

    def _config(self, overrides: Sequence[str]) -> TrainConfig:
        return cli.compose("train", TrainConfig, ["run=demo", "data.path=x", *self._plan.train, *overrides])

    def _passed(self, reached: dict[str, float], guessing: Baseline) -> int:
        faults = []
        if not reached["eval/mlm_loss"] <= guessing.mlm_loss - self._plan.mlm_margin:
            faults.append(f"held-out MLM loss is not {self._plan.mlm_margin} nats below guessing")
        if not reached["eval/nsp_accuracy"] >= guessing.nsp_accuracy + self._plan.nsp_margin:
            faults.append(f"held-out NSP accuracy is not {self._plan.nsp_margin:.0%} above guessing")
        cut_short = self._config(self._overrides).steps < self._config(()).steps
        if faults and cut_short and all(map(math.isfinite, reached.values())):
            print(f"note: {' and '.join(faults)}; the demo without {shlex.join(self._overrides)} gets there")
        elif faults:
            raise TrainingError(f"{self._paths.run}: {' and '.join(faults)}; see {self._paths.run / REPORT_NAME}")
        return ExitCode.OK


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end. Ctrl-C reaches it from the terminal, SIGTERM is handed on; both are its to answer."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:

        def forward_signal(number: int, frame: FrameType | None) -> None:
            del frame
            child.send_signal(number)

        before = signal.signal(signal.SIGINT, lambda *_: None), signal.signal(signal.SIGTERM, forward_signal)
        try:
            code = child.wait()
        finally:
            signal.signal(signal.SIGINT, before[0])
            signal.signal(signal.SIGTERM, before[1])
    return code if code >= 0 else 128 - code


def remove_earlier(paths: Paths) -> None:
    """Remove what an earlier demo made, but the run's metrics. Raises `UserError` before anything goes."""
    kinds = {paths.shards: ownership.CORPUS, paths.run: ownership.RUN, paths.model: ownership.EXPORT}
    there = {path: kind for path, kind in kinds.items() if path.exists()}
    for path, kind in there.items():
        ownership.require_own(path, kind)
    if paths.run in there:
        kept = paths.run.with_name(f"{paths.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        for metrics in sorted(paths.run.glob("metrics*.jsonl")):
            kept.mkdir(exist_ok=True)
            metrics.rename(kept / metrics.name)
        if kept.exists():
            print(f"the earlier run's metrics are in {kept}", flush=True)
    for path, kind in there.items():
        ownership.remove_own(path, kind)


PARSER = cli.parser("launch.demo", "Text to shards to pretraining to a Hugging Face model, in minutes.")
PARSER.add_argument("--fresh", action="store_true", help="first remove what an earlier demo made")
PARSER.add_argument("overrides", nargs="*", metavar="key=value", help="training overrides, such as steps=300")


@cli.command(PARSER)
def main(options: Namespace) -> int:
    paths = Paths()
    if options.fresh:
        remove_earlier(paths)
    machine = this_machine()
    plan = ON_GPU if machine.gpus else ON_CPU
    print(f"demo on {len(machine.gpus)} GPU(s)" if machine.gpus else f"demo on {machine.cpus} CPU core(s)", flush=True)
    return Demo(plan, options.overrides, paths).run()


if __name__ == "__main__":
    sys.exit(main())
