"""The rows of data.train and data.dev, from files as users have them or from the hub, and what becomes of bad ones.

A row that cannot be used is left out, counted and told; more of them than data.max_bad_fraction are refused. Every
fault names the key, the file and the line. Knows nothing of models. Texts are read whole: such data are small.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import fsspec

from cloze.errors import UserError, first_line
from cloze.log import log
from finetune.readers import Row

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

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


def both_sets(config: "FinetuneConfig") -> tuple[Dataset, Dataset]:
    """data.train and data.dev. Raises `UserError` where either is missing, empty or malformed."""
    task, found = config.definition, []
    for name, split in (("train", "train"), ("dev", task.dev_split)):
        source = getattr(config.data, name) or (f"hub:{task.hub}:{split}" if task.hub else None)
        if source is None:
            raise UserError(f"data.{name}: task={config.task} needs a file; add data.{name}=… to the command line")
        found.append(_read(source, f"data.{name}={source}", config))
    return found[0], found[1]


def mismatched_set(config: "FinetuneConfig") -> Dataset | None:
    """data.mismatched; None where there is no such set."""
    task, source = config.definition, config.data.mismatched
    if source is None and config.data.dev is None and task.mismatched_split:
        source = f"hub:{task.hub}:{task.mismatched_split}"
    return _read(source, f"data.mismatched={source}", config) if source else None


def sha256(config: "FinetuneConfig") -> dict[str, str]:
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


def _read(source: str, name: str, config: "FinetuneConfig") -> Dataset:
    if source.startswith("hub:"):
        rows = _hub_rows(source, name)
    else:
        text = _text(source, name)
        try:
            rows = config.definition.family.read(text, source, config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    if not rows:
        raise UserError(f"{name}: holds no examples")
    return Dataset(name=name, rows=rows, max_bad_fraction=config.data.max_bad_fraction)


def _text(path: str, name: str) -> str:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            text: str = file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (OSError, EOFError, ValueError, ImportError) as error:
        raise UserError(f"{name}: cannot be read ({first_line(error)}); a UTF-8 text file is needed") from error
    return text if "\n" in text else text.replace("\r", "\n")  # old Macs end lines so


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
    rows = []
    for number, row in enumerate(data):
        labels = {key: to_name(row[key]) if row[key] >= 0 else "-" for key, to_name in names.items()}
        rows.append(Row(f"row {number}", {**row, **labels}))
    return rows


def label_names(train: Sequence[str], dev: Sequence[str], config: "FinetuneConfig") -> list[str]:
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
    return [*config.definition.labels] or names


def majority(labels: Sequence[str]) -> float:
    """Share of the most frequent label: the accuracy of guessing it."""
    return max(Counter(labels).values()) / len(labels)
