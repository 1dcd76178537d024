"""The rows of data.train and data.dev, from files as users have them or from the hub, and what becomes of bad ones.

A row that cannot be used is left out, counted and told; more of them than data.max_bad_fraction are refused. Every
fault names the key, the file and the line. Knows nothing of models. Texts are read whole: such data are small.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from cloze.encodings import codec_of, guessed
from cloze.errors import UserError, first_line
from cloze.log import log
from finetune.readers import Row
from finetune.tasks import TaskConfig

T = TypeVar("T")


class BadRow(Exception):
    """One row cannot be used. The message says why, and not where."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The rows of one file, or of one split of the hub."""

    name: str  # key and file, for messages: data.train=a.tsv
    rows: Sequence[Row]
    max_bad_fraction: float = 0.0

    def convert(self, parse: Callable[[Row], T | None]) -> list[T]:
        """What `parse` makes of each row, without those of which it makes None; `BadRow`s are left out and counted.

        Raises `UserError` with the first fault where they are too many; a single one of several rows never is.
        """
        found: list[T] = []
        faults: list[str] = []
        for row in self.rows:
            try:
                if row.fault:
                    raise BadRow(row.fault)
                if (one := parse(row)) is not None:
                    found.append(one)
            except BadRow as fault:
                faults.append(f"{row.place}: {fault}")
        if faults:
            share = len(faults) / len(self.rows)
            if not found or (len(faults) > 1 and share > self.max_bad_fraction):
                count = f"; so are {share:.1%} of the rows, data.max_bad_fraction allows {self.max_bad_fraction:.1%}"
                raise UserError(f"{self.name}: {faults[0]}{count if len(faults) > 1 else ''}")
            log.warning(f"{self.name}: {len(faults)} of {len(self.rows)} rows were left out; {faults[0]}")
        return found


def both_sets(config: TaskConfig) -> tuple[Dataset, Dataset]:
    """data.train and data.dev. Raises `UserError` where either is missing, empty or malformed.

    Where data.train is named and data.dev is not, a share of the former is held out: by hash, so the same one in every
    run, and a row that is added moves no other.
    """
    task, train, dev = config.definition, config.data.train, config.data.dev
    if train is None and task.hub is None:
        raise UserError(f"data.train: task={config.task} needs a file; add data.train=… to the command line")
    if dev is None and train is None:
        dev = f"hub:{task.hub}:{task.dev_split}"
    train = train or f"hub:{task.hub}:train"
    rows = _read(train, f"data.train={train}", config)
    return (rows, _read(dev, f"data.dev={dev}", config)) if dev else _cut(rows, config)


def _cut(whole: Dataset, config: TaskConfig) -> tuple[Dataset, Dataset]:
    """The rows for training, and those held out."""
    fraction = config.data.dev_fraction
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in whole.rows:
        text = json.dumps(
            None if row.fault else config.definition.family.text(row, config.columns), sort_keys=True, default=str
        )
        place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
        parts[place < fraction and not row.fault].append(row)
    train, dev = parts
    if not train or not dev:
        raise UserError(
            f"{whole.name}: its {len(whole.rows)} rows are too few to hold out {fraction:.1%}; name data.dev, or set "
            "data.dev_fraction"
        )
    many = f"{len(dev)} of {len(whole.rows)} rows of data.train"
    log.info(f"data.dev: none is given: {many} are held out, by hash of their text (data.dev_fraction={fraction:g})")
    return replace(whole, rows=train), replace(whole, name=f"data.dev, cut from {whole.name}", rows=dev)


def more_sets(config: TaskConfig) -> dict[str, Dataset]:
    """What is scored beside data.dev: data.test and data.mismatched, where they are given."""
    found = {"mismatched": mismatched_set(config)}
    if (test := config.data.test) is not None:
        found["test"] = _read(test, f"data.test={test}", config)
    return {name: dataset for name, dataset in found.items() if dataset is not None}


def mismatched_set(config: TaskConfig) -> Dataset | None:
    """data.mismatched; None where there is no such set."""
    task, source = config.definition, config.data.mismatched
    if source is None and config.data.dev is config.data.train is None and task.mismatched_split:
        source = f"hub:{task.hub}:{task.mismatched_split}"
    return _read(source, f"data.mismatched={source}", config) if source else None


def sha256(config: TaskConfig) -> dict[str, str]:
    """Of what is read: the data's files, and the directories of models but for their cards, which change later."""
    data = {f"data.{name}": getattr(config.data, name) for name in ("train", "dev", "mismatched", "test")}
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


def _read(source: str, name: str, config: TaskConfig) -> Dataset:
    if source.startswith("hub:"):
        rows = _hub_rows(source, name)
    else:
        text = _text(source, name, config.data.encoding)
        try:
            rows = config.definition.family.read(text, source, config.columns)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if not rows:
        raise UserError(f"{name}: holds no examples")
    return Dataset(name=name, rows=rows, max_bad_fraction=config.data.max_bad_fraction)


def _text(path: str, name: str, encoding: str | None) -> str:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            data: bytes = file.read()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (OSError, EOFError, ValueError, ImportError) as error:
        why = "it is a directory" if isinstance(error, IsADirectoryError) else first_line(error)
        raise UserError(f"{name}: cannot be read ({why}); a text file is needed") from error
    codec = codec_of(data[:4], encoding or "auto")
    try:
        text = data.decode(codec).removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        looks = guessed([each for each in data.split(b"\n") if not _is_utf_8(each)])
        remedy = f"set data.encoding={looks}, which it looks like" if looks else "set data.encoding"
        raise UserError(f"{name}: line {line}: is not {codec.upper()}; {remedy}") from None
    return text if "\n" in text else text.replace("\r", "\n")  # old Macs end lines so


def _is_utf_8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _hub_rows(source: str, name: str) -> list[Row]:
    """Rows of `hub:NAME@CONFIG:SPLIT`, or of a directory in the hub's format; numbered labels become their names."""
    try:
        from datasets import ClassLabel, disable_progress_bars, load_dataset
    except ModuleNotFoundError:
        raise UserError(f"{name}: needs datasets: pip install 'cloze[hub]'") from None
    where, _, split = source.removeprefix("hub:").rpartition(":")
    where, _, subset = where.partition("@")
    if not where or not split:
        raise UserError(f"{name}: NAME and SPLIT are needed: hub:NAME:SPLIT, or hub:NAME@CONFIG:SPLIT")
    disable_progress_bars()
    try:
        data = load_dataset(where, subset or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # the last for a data set that is a script
        raise UserError(f"{name}: {first_line(error)}; name a file with data.train and data.dev") from error
    names = {key: kind.int2str for key, kind in data.features.items() if isinstance(kind, ClassLabel)}
    of_lists = {key: getattr(kind, "feature", None) for key, kind in data.features.items()}
    tags = {key: kind.int2str for key, kind in of_lists.items() if isinstance(kind, ClassLabel)}
    rows = []
    for number, row in enumerate(data):
        labels = {key: to_name(row[key]) if row[key] >= 0 else "-" for key, to_name in names.items()}
        labels |= {key: [to_name(one) for one in row[key]] for key, to_name in tags.items()}
        rows.append(Row(f"row {number}", {**row, **labels}))
    return rows


def named_label(label: str, names: Sequence[str] | None) -> str:
    """The name that data.labels gives to a label that is a number. Raises `BadRow` where it has no such."""
    if names is None or label in names:
        return label
    if not (label.isdecimal() and int(label) < len(names)):
        raise BadRow(f"label {label!r}: data.labels has {', '.join(names)}, or 0 to {len(names) - 1}")
    return names[int(label)]


def label_names(train: Dataset, labels: Sequence[str], config: TaskConfig) -> list[str]:
    """Labels in the order of their ids: the task's, else by value or name. Raises `UserError` for a single one."""
    require_two(train, labels, "there is nothing to learn")
    found = {*labels}
    names = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    return [*config.definition.labels] or [*(config.data.labels or ())] or names


def require_two(dataset: Dataset, labels: Sequence[str], why: str) -> None:
    """Raises `UserError` where all labels are the same."""
    if len({*labels}) == 1:
        raise UserError(f"{dataset.name}: every label is {labels[0]!r}: {why}; add examples of the others")


def require_known(label: str, known: Collection[str] | None, place: str) -> None:
    """Raises `UserError` for a label that is not among those of data.train."""
    if known is not None and label not in known:
        shown = ", ".join(sorted(known)[:10]) + (", …" if len(known) > 10 else "")
        raise UserError(f"{place}: label {label!r} is not in data.train, which has {shown}")


def tell_cut(name: str, encoded: Any, max_len: int) -> None:
    """Say how many of the examples that a tokenizer `encoded` lost their ends."""
    cut = sum(bool(one.overflowing) for one in encoded.encodings)
    if cut:
        log.info(f"{name}: {cut} of {len(encoded.encodings)} examples are longer than max_len={max_len} and are cut")


def majority(labels: Sequence[str]) -> float:
    """Share of the most frequent label: the accuracy of guessing it."""
    return max(Counter(labels).values()) / len(labels)
