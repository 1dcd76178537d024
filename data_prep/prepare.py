"""Prepare a corpus: wires configuration, plan, stages, executor and progress together."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloze.corpus import diagnosis
from cloze.corpus.manifest import NAME, SplitStatistics
from cloze.errors import ExitCode, UserError
from cloze.log import closing, log
from cloze.patience import telling
from cloze.redact import redact_text
from data_prep.config import ArrayConfig, PrepConfig
from data_prep.executors.base import Executor, executor_of
from data_prep.plan import Plan, abandon, claimed, clear_up, finished_manifest, make_plan, megabytes
from data_prep.preview import early_findings, preview
from data_prep.stages.base import Stage, disk_errors
from data_prep.stages.finish import document_statistics, finish, refuse_unfit, text_findings
from data_prep.stages.map import MAP
from data_prep.stages.near import NEAR
from data_prep.stages.reduce import REDUCE
from data_prep.stages.sample import SAMPLE
from data_prep.stages.tokenizer import has_short_cuts, make_tokenizer, tokenizer_directory

_LONG_BYTES = 2**26  # of text, from which it is worth a look before all of it is encoded


def main(config: PrepConfig) -> int:
    """Prepare, or finish preparing, the corpus that `config` describes."""
    started = time.perf_counter()
    plan = make_plan(config)
    if config.preview:
        return preview(plan)
    with disk_errors(plan), claimed(plan) as complete:
        if complete:
            clear_up(plan)
            print(f"{redact_text(plan.config.out)} is complete: nothing to do")
            _summarize(plan, None)
            return ExitCode.OK
        with _opened(executor_of(plan)) as executor:
            _prepare(plan, executor)
    _summarize(plan, time.perf_counter() - started)
    return ExitCode.OK


def _prepare(plan: Plan, executor: Executor) -> None:
    log.info(
        f"{len(plan.files)} files, about {megabytes(plan.text_bytes)} of text: "
        f"{len(plan.tasks)} map task{'s' * (len(plan.tasks) != 1)}, "
        f"{plan.num_buckets} + {plan.num_all_buckets - plan.num_buckets} buckets"
    )
    if not tokenizer_directory(plan).is_dir() and plan.config.tokenizer.path is None:
        _run(plan, executor, SAMPLE)
    if not executor.leads:
        executor.wait_for(tokenizer_directory(plan))
    with _endless("tokenizer: training"):
        facts = make_tokenizer(plan)
    log.info(f"tokenizer: {facts.vocab_size:,} tokens, {facts.fingerprint[:12]}")
    if executor.leads and not has_short_cuts(plan):
        log.info("tokenizer: its pipeline is not one that is encoded by short cuts; `tokenizers` encodes: slower")
    if executor.leads and plan.text_bytes > _LONG_BYTES:
        with _refusal(plan), telling("a first look"):
            refuse_unfit(plan, early_findings(plan))
    _run(plan, executor, MAP)
    if executor.leads:
        with _refusal(plan):  # of bad input before any shard is made of it
            document_statistics(plan)
            refuse_unfit(plan, text_findings(plan))
    if plan.config.clean.near_duplicates is not None:
        _run(plan, executor, NEAR)
    _run(plan, executor, REDUCE)
    if executor.leads:
        with telling("finishing"):
            finish(plan, facts)
    else:
        executor.wait_for(plan.out / NAME)


@contextmanager
def _refusal(plan: Plan) -> Iterator[None]:
    """What is refused leaves nothing behind that would stand in the way of the corrected command.

    Unless other calls work on it, which know by the plan that they must wait.
    """
    try:
        yield
    except UserError as error:
        if error.exit_code is ExitCode.USAGE and not isinstance(plan.config.executor, ArrayConfig):
            abandon(plan)
        raise


@contextmanager
def _opened(executor: Executor) -> Iterator[Executor]:
    """Closed in the end."""
    try:
        yield executor
    except BaseException:
        executor.close(failed=True)
        raise
    executor.close(failed=False)


def _run(plan: Plan, executor: Executor, stage: Stage) -> None:
    """Run the tasks of a stage that no earlier run has done."""
    missing = [number for number, path in enumerate(stage.results(plan)) if not path.exists()]
    total = stage.num_tasks(plan)
    with _progress(stage, total) as advance:
        advance(total - len(missing))
        for _ in executor.run(stage, missing):
            advance(1)


@contextmanager
def _endless(what: str) -> Iterator[None]:
    """Of what nobody knows how much is left: a bar without an end on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        with telling(what):
            yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def _progress(stage: Stage, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line now and then; on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task(stage.name, total=total)
            yield lambda count: progress.advance(task, count)
        return
    started, done, told = time.perf_counter(), 0, 0

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if done == total or done >= told + max(1, total // 5):
            told = done
            log.info(f"{stage.name}: {done}/{total} tasks, {time.perf_counter() - started:.1f} s")

    with telling(lambda: f"{stage.name}: {done}/{total} tasks"):
        yield advance


def _summarize(plan: Plan, seconds: float | None) -> None:
    manifest = finished_manifest(plan)
    assert manifest is not None
    documents = manifest.documents
    rows = [("documents", f"{documents['read']:,} read, {documents['kept']:,} kept")]
    rows += [(f"  dropped, {reason}", f"{count:,}") for reason, count in sorted(documents["dropped"].items())]
    rows += [(f"  repaired, {reason}", f"{count:,}") for reason, count in sorted(documents["repaired"].items())]
    for source in documents["sources"] if len(documents["sources"]) > 1 else ():
        role = source.get("split") or f"weight {source['weight']:g}"
        text = f"{source['kept']:,} of {source['read']:,} kept, {source['tokens']:,} tokens, {role}"
        rows.append((f"  {source['kind']} {(source['paths'] or [''])[0]}", text))
    rows += [(name, _described(split, manifest.objective)) for name, split in manifest.splits.items()]
    size = sum(shard.bytes for shard in manifest.shards)
    rows.append(("shards", f"{len(manifest.shards)} in {plan.config.out}, {megabytes(size)}"))
    if seconds is not None:
        text = documents["bytes"]
        rows.append(("speed", f"{megabytes(text)} of text in {seconds:.1f} s: {megabytes(text / seconds)}/s"))
    for name, value in rows:
        print(f"{name:28} {redact_text(value)}")
    diagnosis.tell(diagnosis.stored(manifest), plan.config.diagnosis.ignore)
    if plan.remote:
        train = ("python", "-m", "launch", f"data.path={plan.remote}", "data.cache_dir=cache", f"run={plan.out.name}")
        closing(f"{plan.remote}: finished, and uploaded", *train)
    else:
        closing(f"{plan.out}: finished", "python", "-m", "data_prep.verify", str(plan.out))


def _described(split: SplitStatistics, objective: str) -> str:
    text = f"{split.samples:,} samples, {split.tokens:,} tokens, mean length {split.tokens / max(1, split.samples):.1f}"
    label = {"nsp": "random next", "sop": "swapped"}.get(objective)
    return text + (f", {label} {split.random_next / max(1, split.samples):.1%}" if label else "")
