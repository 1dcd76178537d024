"""Prepare a corpus: wires configuration, plan, engine and progress together."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloze.corpus.manifest import NAME, SplitStatistics
from cloze.errors import ExitCode
from data_prep.config import PrepConfig
from data_prep.executors.executors import Engine, engine_for
from data_prep.plan import Plan, claimed, clear_up, finished_manifest, make_plan
from data_prep.stages import tasks
from data_prep.stages.finish import document_statistics, finish
from data_prep.stages.tasks import Stage

MB = 1e6


def main(config: PrepConfig) -> int:
    """Prepare, or finish preparing, the corpus that `config` describes."""
    started = time.perf_counter()
    plan = make_plan(config)
    with tasks.disk_errors(plan), claimed(plan) as complete:
        if complete:
            clear_up(plan)
            print(f"{plan.config.out} is complete: nothing to do")
            _summarize(plan, None)
            return ExitCode.OK
        with engine_for(plan) as engine:
            _prepare(plan, engine)
    _summarize(plan, time.perf_counter() - started)
    return ExitCode.OK


def _prepare(plan: Plan, engine: Engine) -> None:
    print(
        f"{len(plan.files)} files, about {plan.text_bytes / MB:,.1f} MB of text: "
        f"{len(plan.tasks)} map tasks, {plan.num_buckets} + {plan.num_val_buckets} buckets",
        file=sys.stderr,
    )
    if not (plan.out / "tokenizer").is_dir() and plan.config.tokenizer.path is None:
        _run(plan, engine, Stage.sample)
    if not engine.leads:
        engine.wait_for(plan.out / "tokenizer")
    facts = tasks.make_tokenizer(plan)
    print(f"tokenizer: {facts.vocab_size:,} tokens, {facts.fingerprint[:12]}", file=sys.stderr)
    _run(plan, engine, Stage.map)
    if engine.leads:
        document_statistics(plan)  # refuses bad input before any shard is made of it
    if plan.config.clean.near_duplicates is not None:
        _run(plan, engine, Stage.near)
    _run(plan, engine, Stage.reduce)
    if engine.leads:
        finish(plan, facts)
    else:
        engine.wait_for(plan.out / NAME)


def _run(plan: Plan, engine: Engine, stage: Stage) -> None:
    """Run the tasks of a stage that no earlier run has done."""
    numbers = range(tasks.num_tasks(plan, stage))
    missing = [number for number in numbers if not tasks.result_path(plan, stage, number).exists()]
    with _progress(stage, len(numbers)) as advance:
        advance(len(numbers) - len(missing))
        for _ in engine.run(stage, missing):
            advance(1)


@contextmanager
def _progress(stage: Stage, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then; on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task(stage, total=total)
            yield lambda count: progress.advance(task, count)
        return
    started, done, told = time.perf_counter(), 0, 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if done == total or done >= told + max(1, total // 5):
            told = done
            print(f"{stage}: {done}/{total} tasks, {time.perf_counter() - started:.1f} s", file=sys.stderr)

    yield advance


def _summarize(plan: Plan, seconds: float | None) -> None:
    manifest = finished_manifest(plan)
    assert manifest is not None
    documents = manifest.documents
    rows = [("documents", f"{documents['read']:,} read, {documents['kept']:,} kept")]
    rows += [(f"  dropped, {reason}", f"{count:,}") for reason, count in sorted(documents["dropped"].items())]
    rows += [(f"  repaired, {reason}", f"{count:,}") for reason, count in sorted(documents["repaired"].items())]
    for source in documents["sources"] if len(documents["sources"]) > 1 else ():
        text = (
            f"{source['kept']:,} of {source['read']:,} kept, {source['tokens']:,} tokens, weight {source['weight']:g}"
        )
        rows.append((f"  {source['kind']} {(source['paths'] or [''])[0]}", text))
    rows += [(name, _described(split, manifest.objective)) for name, split in manifest.splits.items()]
    size = sum(shard.bytes for shard in manifest.shards)
    rows.append(("shards", f"{len(manifest.shards)} in {plan.config.out}, {size / MB:,.1f} MB"))
    if seconds is not None:
        text = documents["bytes"] / MB
        rows.append(("speed", f"{text:,.1f} MB of text in {seconds:.1f} s: {text / seconds:.1f} MB/s"))
    train = f"deepspeed pretrain/train.py data.path={plan.remote} data.cache_dir=…"
    rows.append(("next", train if plan.remote else f"python -m data_prep.verify {plan.out}"))
    for name, value in rows:
        print(f"{name:28} {value}")


def _described(split: SplitStatistics, objective: str) -> str:
    text = f"{split.samples:,} samples, {split.tokens:,} tokens, mean length {split.tokens / max(1, split.samples):.1f}"
    label = {"nsp": "random next", "sop": "swapped"}.get(objective)
    return text + (f", {label} {split.random_next / max(1, split.samples):.1%}" if label else "")
