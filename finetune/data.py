"""Labelled examples from files as users have them, or from the hub. Every fault names the key, the file and the line.

Knows nothing of models. Texts are read whole: data for fine-tuning are small.
"""

import csv
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from cloze.errors import UserError
from finetune.config import FinetuneConfig
from finetune.tasks import TASKS, Family, Layout, Task

_ANSWER = ("text", "answer_start")

Entity = tuple[str, int, int]  # type, first word, word after the last
Row = tuple[str, dict[str, Any]]  # where it stands, for errors, and its columns


class Example(NamedTuple):
    first: str
    second: str | None  # None: the task is about single sentences
    label: str


class Sentence(NamedTuple):
    words: tuple[str, ...]
    tags: tuple[str, ...]


class Question(NamedTuple):
    id: str
    question: str
    context: str
    answers: tuple[str, ...]  # empty: the context has none (SQuAD 2.0)
    start: int  # first character of answers[0]


class Document(NamedTuple):
    sentences: tuple[str, ...]
    summary: str


def both_sets(config: FinetuneConfig) -> tuple[list[Row], list[Row]]:
    """Rows of data.train and data.dev. Raises `UserError` where either is missing, empty or malformed."""
    task, found = TASKS[config.task], []
    for name, split in (("train", "train"), ("dev", task.dev_split)):
        source = getattr(config.data, name) or (f"hub:{task.hub}:{split}" if task.hub else None)
        if source is None:
            raise UserError(f"data.{name}: task={config.task} needs a file; add data.{name}=… to the command line")
        found.append(_rows(source, f"data.{name}={source}", task))
    return found[0], found[1]


def mismatched_rows(config: FinetuneConfig) -> list[Row]:
    """Rows of data.mismatched; none where there is no such set."""
    task, source = TASKS[config.task], config.data.mismatched
    if source is None and config.data.dev is None and task.mismatched_split:
        source = f"hub:{task.hub}:{task.mismatched_split}"
    return _rows(source, f"data.mismatched={source}", task) if source else []


def sha256(config: FinetuneConfig) -> dict[str, str]:
    """Of what is read: the data's files, and the directories of models but for their cards, which change later."""
    data = {f"data.{name}": getattr(config.data, name) for name in ("train", "dev", "mismatched")}
    found = {}
    for key, name in {**data, "model": config.model, "distill.teacher": config.distill.teacher}.items():
        path = Path(name or "")
        files = [path] if path.is_file() else sorted(one for one in path.glob("*") if one.suffix not in (".md", ".svg"))
        if name and (files := [file for file in files if file.is_file()]):
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
            found[key] = digest.hexdigest()
    return found


def _rows(source: str, where: str, task: Task) -> list[Row]:
    rows = _hub_rows(source, where) if source.startswith("hub:") else _file_rows(source, where, task)
    if not rows:
        raise UserError(f"{where}: holds no examples")
    return rows


def _file_rows(path: str, where: str, task: Task) -> list[Row]:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (OSError, EOFError, ValueError, ImportError) as error:
        raise UserError(f"{where}: cannot be read ({error}); a UTF-8 text file is needed") from error
    if task.family is Family.tokens:
        return _conll_rows(text, where)
    name = path.removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".xz")
    if name.endswith((".jsonl", ".json")):
        return _squad_rows(text, where) if task.family is Family.qa else _jsonl_rows(text, where)
    return _table_rows(text, where, task, quoted=name.endswith(".csv"))


def _table_rows(text: str, where: str, task: Task, *, quoted: bool) -> list[Row]:
    """CSV as Python's csv module reads it; in TSV a quotation mark is text, as in GLUE's files."""
    if quoted:
        lines = list(_csv_lines(text, where))
    else:
        split = (line.rstrip("\r") for line in text.split("\n"))
        lines = [(number, line.split("\t")) for number, line in enumerate(split, 1) if line.strip()]
    if not lines:
        return []
    header = lines[0][1]
    if task.header and len(header) == len(task.header) and not any({*names} <= {*header} for names in task.layouts):
        header = list(task.header)
    else:
        lines = lines[1:]
    rows, num_short = [], 0
    for number, cells in lines:
        if len(cells) < len(header) and task.has_short_rows:
            num_short += 1
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: line {number}: {len(cells)} columns where the header has {len(header)}")
        rows.append((f"{where}: line {number}", dict(zip(header, cells, strict=True))))
    if num_short:
        print(f"{where}: {num_short} lines with too few columns were left out", file=sys.stderr)
    return rows


def _csv_lines(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(len(text), 1))  # the module's own is 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        yield from ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num}: {error}; mend it") from None


def _jsonl_rows(text: str, where: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number}: not a JSON object")
        rows.append((f"{where}: line {number}", row))
    return rows


def _conll_rows(text: str, where: str) -> list[Row]:
    """A word and its tag to a line, as first and last column; a blank line ends a sentence."""
    rows: list[Row] = []
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, raw in enumerate([*text.split("\n"), ""], 1):
        cells = raw.strip("\r\n ").split("\t" if "\t" in raw else None)
        if not any(cells) or cells[0] == "-DOCSTART-":
            if words:
                rows.append((where, {"words": words, "tags": tags, "line": start}))
            words, tags, start = [], [], number + 1
        elif len(cells) < 2 or not cells[0].strip():
            raise UserError(f"{where}: line {number}: {raw.strip()!r}: a word and its tag are needed, apart by a tab")
        else:
            words.append(cells[0])
            tags.append(cells[-1])
    return rows


def _squad_rows(text: str, where: str) -> list[Row]:
    """SQuAD's nested JSON, or a line for each question with id, question, context and answers."""
    try:
        body = json.loads(text)
    except ValueError:
        return _jsonl_rows(text, where)  # many objects, or none: lines tell where it breaks
    if not isinstance(body, dict) or "data" not in body:
        return _jsonl_rows(text, where)
    rows = []
    try:
        for article in body["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    row = {**qa, "context": paragraph["context"]}
                    if qa.get("is_impossible"):
                        row["answers"] = []
                    rows.append((f"{where}: question {qa.get('id')}", row))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: not SQuAD's format ({error}); data, paragraphs, qas and context are needed"
        ) from None
    return rows


def _hub_rows(source: str, where: str) -> list[Row]:
    """Rows of `hub:NAME@CONFIG:SPLIT`, or of a directory in the hub's format; numbered labels become their names."""
    try:
        from datasets import ClassLabel, disable_progress_bars, load_dataset
    except ModuleNotFoundError:
        raise UserError(f"{where}: needs datasets: pip install 'cloze[hub]'") from None
    name, _, split = source.removeprefix("hub:").rpartition(":")
    name, _, subset = name.partition("@")
    if not name or not split:
        raise UserError(f"{where}: NAME and SPLIT are needed: hub:NAME:SPLIT, or hub:NAME@CONFIG:SPLIT")
    disable_progress_bars()
    try:
        data = load_dataset(name, subset or None, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}; name a file with data.train and data.dev") from error
    names = {key: kind.int2str for key, kind in data.features.items() if isinstance(kind, ClassLabel)}
    rows = []
    for number, row in enumerate(data):
        labels = {key: to_name(row[key]) if row[key] >= 0 else "-" for key, to_name in names.items()}
        rows.append((f"{where}: row {number}", {**row, **labels}))
    return rows


def examples(rows: Sequence[Row], config: FinetuneConfig) -> list[Example]:
    """Texts and labels from the columns of the task. Examples that the task calls unlabelled are left out."""
    task = TASKS[config.task]
    if columns := config.data.columns:
        if len(columns) not in (2, 3):
            raise UserError(f"data.columns={columns}: two or three names are needed: text, perhaps second text, label")
        layouts: Sequence[Layout] = (tuple(columns),)
    else:
        layouts = task.layouts
    layout = next((names for names in layouts if {*names} <= rows[0][1].keys()), None)
    found = []
    for where, row in rows:
        if layout is None or not {*layout} <= row.keys():
            wanted = " or ".join(", ".join(names) for names in ([layout] if layout else layouts))
            there = ", ".join(filter(None, row)) or "none"
            raise UserError(f"{where}: the columns {wanted} are needed, there are {there}; data.columns names others")
        if faulty := [name for name in layout if row[name] in (None, "") or isinstance(row[name], list | dict)]:
            raise UserError(f"{where}: {faulty[0]} is {json.dumps(row[faulty[0]])[:40]}; a text is needed there")
        if str(row[layout[-1]]) not in task.unlabelled:
            texts = [str(row[name]) for name in layout[:-1]]
            label = _checked_label(str(row[layout[-1]]), where, config.task)
            found.append(Example(texts[0], texts[1] if len(texts) > 1 else None, label))
    if not found:
        raise UserError(f"{rows[0][0]}: no example has a label")
    return found


def _checked_label(label: str, where: str, name: str) -> str:
    """The label under its name, or the number. Raises `UserError` for one that the task does not have."""
    task = TASKS[name]
    if task.family is Family.regression:
        low, high = task.label_range or (float("-inf"), float("inf"))
        try:
            number = float(label)
        except ValueError:
            number = float("nan")
        if not low <= number <= high or abs(number) == float("inf"):
            wanted = f"a number from {low:g} to {high:g}" if low > float("-inf") else "a number"
            raise UserError(f"{where}: task={name}: label {label!r}: must be {wanted}")
    elif task.labels and label not in task.labels:
        if not (label.isdecimal() and int(label) < len(task.labels)):
            shown = f"{', '.join(task.labels)} or 0 to {len(task.labels) - 1}"
            raise UserError(f"{where}: task={name}: label {label!r}: must be {shown}; task=classification takes any")
        return task.labels[int(label)]
    return label


def sentences(rows: Sequence[Row], *, repair: bool = False) -> list[Sentence]:
    """Words and tags; `UserError` for the first tag that breaks the scheme: BIO or, where E or S occur, BIOES.

    With `repair`, entities that do not begin or end as they should are spelled anew, as `entities` reads them.
    """
    for where, row in rows:
        if not {"words", "tags"} <= row.keys():
            raise UserError(
                f"{where}: words and tags are needed, there are {', '.join(row)}; name a file in CoNLL's format"
            )
    closed = any(tag[:2] in ("E-", "S-") for _, row in rows for tag in row["tags"])
    found, num_repaired = [], 0
    for where, row in rows:
        tags = row["tags"]
        if repair and any(_tag_fault(a, b, closed) for a, b in pairwise(["O", *tags, "O"])):
            tags = _spelled(entities(tags), len(tags), closed)
            num_repaired += 1
        for number, (before, tag) in enumerate(pairwise(["O", *tags, "O"]), row.get("line", 1)):
            if fault := _tag_fault(before, tag, closed):
                raise UserError(f"{where}: line {number}: {fault}; or repair all such by data.repair_tags=true")
        found.append(Sentence(tuple(row["words"]), tuple(tags)))
    if num_repaired:
        print(f"{rows[0][0]}: the tags of {num_repaired} of {len(rows)} sentences were repaired", file=sys.stderr)
    return found


def entities(tags: Sequence[str]) -> set[Entity]:
    """Entities of BIO or BIOES tags; of a model's faulty ones as CoNLL's script has it: a new type begins an entity."""
    found, start, kind, ended = set(), 0, "", True
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, new = tag.partition("-")
        if kind and (ended or prefix in "BSO" or new != kind):
            found.add((kind, start, i))
            kind = ""
        if prefix != "O" and not kind:
            start, kind = i, new
        ended = prefix in "ES"
    return found


def _spelled(found: set[Entity], num_words: int, closed: bool) -> list[str]:
    tags = ["O"] * num_words
    for kind, start, end in found:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
        if closed:
            tags[end - 1] = f"{'S' if end == start + 1 else 'E'}-{kind}"
    return tags


def _tag_fault(before: str, tag: str, closed: bool) -> str | None:
    prefix, _, kind = tag.partition("-")
    scheme = "BIOES" if closed else "BIO"
    if tag != "O" and (prefix == "O" or prefix not in {*scheme} or not kind):
        return f"tag {tag!r}: O, or one of {', '.join(f'{p}-TYPE' for p in scheme if p != 'O')} is needed"
    inside = before[:1] in ("B", "I")  # an entity of `before` may go on, and under BIOES must
    continues = prefix in ("I", "E")
    if continues and not (inside and before[2:] == kind):
        return f"{tag} after {before}: an entity begins with B-{kind}" + (f" or S-{kind}" if closed else "")
    if closed and inside and not continues:
        return f"{before} is not followed by I-{before[2:]} or E-{before[2:]}"
    return None


def questions(rows: Sequence[Row]) -> list[Question]:
    """Questions with their answers, given as SQuAD's list of objects or as the hub's object of lists.

    Raises `UserError` for missing columns and for answers that the context does not have at their place.
    """
    found = []
    for number, (where, row) in enumerate(rows):
        if missing := [name for name in ("question", "context", "answers") if row.get(name) is None]:
            raise UserError(f"{where}: no {' and no '.join(missing)}; there are {', '.join(row)}")
        if faulty := [name for name in ("question", "context") if not isinstance(row[name], str)]:
            raise UserError(f"{where}: {faulty[0]} is {json.dumps(row[faulty[0]])[:40]}; a text is needed there")
        answers = row["answers"]
        try:
            if isinstance(answers, dict):
                answers = [{"text": t, "answer_start": s} for t, s in zip(*map(answers.get, _ANSWER), strict=True)]
            spans = [(str(answer["text"]), int(answer["answer_start"])) for answer in answers]
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{where}: answers need text and answer_start") from None
        for text, start in spans:
            if not text or start < 0 or not row["context"].startswith(text, start):
                raise UserError(f"{where}: the context does not have the answer {text[:60]!r} at character {start}")
        texts, starts = zip(*spans, strict=True) if spans else ((), (0,))
        found.append(Question(str(row.get("id", number)), row["question"], row["context"], texts, starts[0]))
    return found


def documents(rows: Sequence[Row]) -> list[Document]:
    """Sentences and summary of each document; a summary may be a list of sentences too."""
    found = []
    for where, row in rows:
        sentences, summary = row.get("sentences"), row.get("summary")
        if not (isinstance(sentences, list) and sentences and summary):
            raise UserError(f"{where}: sentences (a list) and summary are needed, there are {', '.join(row)}")
        text = summary if isinstance(summary, str) else " ".join(map(str, summary))
        found.append(Document(tuple(map(str, sentences)), text))
    return found


def label_names(train: Sequence[str], dev: Sequence[str], config: FinetuneConfig) -> list[str]:
    """Labels in the order of their ids: the task's, else by value or name. Raises `UserError` for unusable ones."""
    found = {*train}
    names = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    if len(names) < 2:
        raise UserError(f"data.train={config.data.train}: every label is {names[0]!r}; there is nothing to learn")
    if unknown := sorted({*dev} - found):
        raise UserError(
            f"data.dev={config.data.dev}: has labels that data.train lacks: {', '.join(unknown[:5])}; "
            f"data.train has {', '.join(names[:10])}"
        )
    if len({*dev}) == 1:
        one = f"every label is {dev[0]!r}: scores would say nothing; add examples of the others"
        raise UserError(f"data.dev={config.data.dev}: {one}")
    return [*TASKS[config.task].labels] or names


def majority(labels: Sequence[str]) -> float:
    """Share of the most frequent label: the accuracy of guessing it."""
    return max(Counter(labels).values()) / len(labels)
