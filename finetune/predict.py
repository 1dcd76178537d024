"""Entry: `python -m finetune.predict model=out/sst2 in=texts.tsv out=labels.tsv`: rows, and what a model says of them.

Rows come out in their order with all their columns. Memory is bounded by a window of rows, in which samples of like
lengths are batched together. A killed run goes on behind the last window that was written.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloze import cli
from cloze.errors import ExitCode, UserError
from cloze.log import closing, log
from cloze.storage import is_remote, stamp
from finetune.config import PredictConfig
from finetune.families import TASKS
from finetune.families.qa import QA, is_nested, squad_rows
from finetune.families.tagging import conll_stream
from finetune.prediction import reading, writing
from finetune.predictor import Trained
from finetune.readers import Columns, Row

_WINDOW_ROWS, _WINDOW_CHARACTERS = 8192, 2**22
_SECONDS = 10.0  # between two lines of progress


def run(config: PredictConfig) -> int:
    """Write `config.out` and tell how many rows it has."""
    num_rows = predict(config)
    print(f"{config.out}: {num_rows} rows")
    closing(f"{config.out}: finished, every row of {config.in_} with its answer")
    return ExitCode.OK


def predict(config: PredictConfig) -> int:
    """Write `config.out`, or go on with its part; returns its number of rows. Raises `UserError`, `DiskError`."""
    formats = reading.format_of(config.in_, config.in_format), writing.format_of(config.out, config.format)
    if is_remote(config.out):
        raise UserError(f"out={config.out}: must be on this machine; copy the finished file from there")
    with writing.Part(Path(config.out), _made_by(config)) as part:
        try:
            tail = _fill(part, config, *formats)
        except ModuleNotFoundError as error:
            raise UserError(f"model={config.model}: needs {error.name}: pip install 'cloze[finetune]'") from None
        part.finish(tail)
    for what, (count, first) in part.notes.items():
        log.warning(f"{what}: {count} of {part.num_rows} rows, the first {first}")
    return part.num_rows


def _made_by(config: PredictConfig) -> dict[str, Any]:
    """What the predictions depend on."""
    folder = Path(config.model)
    files = sorted(folder.glob("*") if folder.is_dir() else folder.parent.glob(folder.name))
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    keys = {
        name: getattr(value, "value", value) for name, value in asdict(config).items() if name not in ("in_", "out")
    }
    try:
        read = [config.in_ if is_remote(config.in_) else str(Path(config.in_).resolve()), *stamp(config.in_)]
    except OSError:
        raise UserError(f"in={config.in_}: no such file") from None
    model = [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
    return {**keys, "model": model, "in": read}


def _fill(part: writing.Part, config: PredictConfig, in_format: str, out_format: str) -> str:
    """Add the rows that `part` has not; returns what comes after the last."""
    from finetune.prediction import model, vectors  # here: they take seconds, and --help none of them
    from finetune.prediction.trained import trained

    known = trained(config)
    task = TASKS[known.task] if known.task else None
    rows = _rows(config, in_format, known)
    first = next(rows, None)
    if first is None:
        raise UserError(f"in={config.in_}: holds no rows")
    make = (task and task.family.predictor) or vectors.predictor
    predictor = make(known, first)
    prefix = config.prefix or ""
    adds = [prefix + name for name in predictor.adds]
    table = writing.table(out_format, [*first.columns], adds, task)
    run, batch_tokens = model.loaded(known, predictor, config.precision)
    what = f"task={known.task}" if known.task else "no task, so vectors"
    log.info(f"model={config.model}: {what}, {known.max_len} tokens at most")
    if part.num_rows:
        log.info(f"out={config.out}: goes on behind row {part.num_rows}")
    started, told, before = time.monotonic(), time.monotonic(), part.num_rows
    rows = itertools.islice(itertools.chain([first], rows), before, None)
    for window in _windows(rows):
        _refuse_taken(window, adds)
        encoded = predictor.encode(window)
        part.note(f"longer than {known.max_len} tokens, and cut", [window[n].place for n in encoded.cut])
        part.note("an empty text, labelled as it is", [window[n].place for n in encoded.empty])
        answers = model.answers(encoded, run, config.batch_tokens or batch_tokens, known.tokenizer)
        part.append(_text(table, part.num_rows, window, _prefixed(answers, prefix)), len(window))
        if time.monotonic() > told + _SECONDS:
            told = time.monotonic()
            log.info(f"{part.num_rows} rows, {(part.num_rows - before) / (told - started):.0f} a second")
    return table.tail


def _rows(config: PredictConfig, kind: str, known: Trained) -> Iterator[Row]:
    """The rows of `config.in_`, their places with its name. Raises `UserError`, too with its name."""
    task = TASKS[known.task] if known.task else None
    try:
        texts = reading.blocks(config.in_, config.encoding)
        head = next(texts, "")
        texts = itertools.chain([head], texts)
        if kind == "conll":
            found: Iterable[Row] = conll_stream(reading.lines(texts), known.conll_columns)
        elif kind == "jsonl" and task and task.family is QA and is_nested(head):
            found = squad_rows("".join(texts), config.in_, Columns())
        else:
            found = reading.rows(texts, kind, known.layouts, task.header if task else None)
        for row in found:
            if row.fault:
                raise UserError(f"{row.place}: {row.fault}; mend it")
            yield Row(f"in={config.in_}: {row.place}", row.columns)
    except UserError as error:
        raise UserError(f"in={config.in_}: {error}") from error


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in pieces that fit into memory. They depend on nothing but the rows, so a run that goes on has the same."""
    window: list[Row] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += sum(len(value if isinstance(value, str) else str(value)) for value in row.columns.values())
        if len(window) == _WINDOW_ROWS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _refuse_taken(window: Sequence[Row], adds: Sequence[str]) -> None:
    """Raises `UserError` where a row has a column that would be written over."""
    taken = {*adds}
    for row in window:
        if not taken.isdisjoint(row.columns):
            raise UserError(f"{row.place}: has a column {(taken & row.columns.keys()).pop()}; set prefix=new_, say")


def _prefixed(answers: Iterable[dict[str, Any]], prefix: str) -> Iterable[dict[str, Any]]:
    if not prefix:
        return answers
    return ({prefix + name: value for name, value in answer.items()} for answer in answers)


def _text(table: writing.Table, start: int, window: Sequence[Row], answers: Iterable[Mapping[str, Any]]) -> str:
    parts = [
        table.row(number, row, answer) for number, (row, answer) in enumerate(zip(window, answers, strict=True), start)
    ]
    return (table.between if start else table.head) + table.between.join(parts)


main = cli.hydra_command("predict", PredictConfig, positional=("model", "in", "out"))(run)

if __name__ == "__main__":
    sys.exit(main())
