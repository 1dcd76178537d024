"""Classifying a sentence or a pair of sentences: files of labelled examples, the model, its training and its scores."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from data_prep.errors import DiskError, UserError
from finetune.config import FinetuneConfig

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


class Example(NamedTuple):
    first: str
    second: str | None  # None: the task is about single sentences
    label: str


def read_examples(path: Path, key: str) -> list[Example]:
    """Examples of a TSV or JSONL file; `key` is the configuration key that named it, for errors.

    A TSV has a header and no quoting: a quotation mark is text. Raises `UserError` for a missing or empty file,
    missing columns, and rows that do not fit, by line.
    """
    where = f"{key}={path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error}); a UTF-8 text file is needed") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = _jsonl_rows(lines, where) if path.suffix in (".jsonl", ".json") else _tsv_rows(lines, where)
    if not rows:
        raise UserError(f"{where}: holds no examples")
    return [_example(number, row, where) for number, row in rows]


def _tsv_rows(lines: Sequence[tuple[int, str]], where: str) -> list[tuple[int, dict[str, Any]]]:
    if not lines:
        return []
    header = lines[0][1].rstrip("\r").split("\t")
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines[1:]:
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise UserError(f"{where}: line {number}: {len(cells)} columns where the header has {len(header)}")
        rows.append((number, dict(zip(header, cells, strict=True))))
    return rows


def _jsonl_rows(lines: Sequence[tuple[int, str]], where: str) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number}: not a JSON object")
        rows.append((number, row))
    return rows


def _example(number: int, row: dict[str, Any], where: str) -> Example:
    first = "sentence" if "sentence" in row else "sentence1"
    second = "sentence2" if first == "sentence1" else None
    missing = [name for name in (first, second, "label") if name is not None and row.get(name) in (None, "")]
    if missing:
        found = ", ".join(name for name in row if name) or "none"
        raise UserError(
            f"{where}: line {number}: no {' and no '.join(missing)}; sentence, or sentence1 and sentence2, and label "
            f"are needed, the columns are {found}"
        )
    return Example(str(row[first]), None if second is None else str(row[second]), str(row["label"]))


def label_names(train: Sequence[Example], dev: Sequence[Example], config: FinetuneConfig) -> list[str]:
    """Labels in the order of their ids: numbers by value, else by name. Raises `UserError` for unusable ones."""
    found = {example.label for example in train}
    names = sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    if len(names) < 2:
        raise UserError(f"data.train={config.data.train}: every label is {names[0]!r}; there is nothing to learn")
    if unknown := sorted({example.label for example in dev} - set(names)):
        raise UserError(
            f"data.dev={config.data.dev}: has labels that data.train lacks: {', '.join(unknown[:5])}; "
            f"data.train has {', '.join(names[:10])}"
        )
    if (train[0].second is None) != (dev[0].second is None):
        raise UserError(f"data.dev={config.data.dev}: one of data.train and data.dev has pairs, the other sentences")
    return names


def scores(labels_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], num_labels: int) -> dict[str, float]:
    """Accuracy, macro F1 over the labels that occur or were predicted, and Matthews' correlation (Gorodkin 2004).

    The correlation is 0 where labels or predictions are all the same, as scikit-learn has it.
    """
    confusion = np.zeros((num_labels, num_labels), dtype=np.float64)  # [label, prediction]
    np.add.at(confusion, (labels_N, predicted_N), 1)
    correct, total = np.trace(confusion), confusion.sum()
    true_L, guessed_L = confusion.sum(axis=1), confusion.sum(axis=0)
    seen = true_L + guessed_L > 0
    f1_L = 2 * np.diag(confusion)[seen] / (true_L + guessed_L)[seen]
    spread = np.sqrt((total**2 - (guessed_L**2).sum()) * (total**2 - (true_L**2).sum()))
    matthews = (correct * total - (true_L * guessed_L).sum()) / spread if spread else 0.0
    return {"accuracy": float(correct / total), "macro_f1": float(f1_L.mean()), "matthews": float(matthews)}


def run(config: FinetuneConfig) -> dict[str, float]:
    """Train, evaluate on data.dev, and write `out`; returns the scores. `out` appears whole or not at all."""
    train = read_examples(Path(config.data.train), "data.train")
    dev = read_examples(Path(config.data.dev), "data.dev")
    names = label_names(train, dev, config)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: not empty; name another directory")
    set_seed(config.seed)
    transformers_logging.set_verbosity_error()  # it would tell at length that the classifier is new
    transformers_logging.disable_progress_bar()
    tokenizer, model = _load(Path(config.model), names)
    limit = min(config.max_len, model.config.max_position_embeddings)

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        trainer = Trainer(
            model=model,
            args=_arguments(config, temporary, len(train)),
            train_dataset=_encoded(train, names, tokenizer, limit),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        logits = trainer.predict(_encoded(dev, names, tokenizer, limit)).predictions
        labels = np.asarray([names.index(example.label) for example in dev], dtype=np.int64)
        result = scores(labels, np.argmax(logits, axis=-1), len(names))
        trainer.save_model(str(temporary))
        tokenizer.save_pretrained(temporary)
        facts = {"task": config.task.value, "model": config.model, "epochs": config.epochs, "seed": config.seed}
        body = {**result, **facts, "train_examples": len(train), "dev_examples": len(dev), "labels": names}
        (temporary / "metrics.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise DiskError(f"out={out}: {error}; free space and run the same command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def _load(folder: Path, names: Sequence[str]) -> tuple[Any, Any]:
    """Tokenizer and model with a new classifier. Raises `UserError` where the directory lacks a part."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model={folder}: no config.json there; name a directory made by `python -m pretrain.export`")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model={folder}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); export the model again")
    try:
        config = AutoConfig.from_pretrained(
            folder,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
        )
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
        return AutoTokenizer.from_pretrained(folder), model
    except (OSError, ValueError) as error:
        raise UserError(f"model={folder}: cannot be loaded ({str(error).splitlines()[0]}); export it again") from error


def _encoded(examples: Sequence[Example], names: Sequence[str], tokenizer: Any, max_len: int) -> list[dict[str, Any]]:
    firsts = [example.first for example in examples]
    seconds = [example.second for example in examples] if examples[0].second is not None else None
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_len)
    return [
        {**{key: values[i] for key, values in encoded.items()}, "labels": names.index(example.label)}
        for i, example in enumerate(examples)
    ]


def _arguments(config: FinetuneConfig, folder: Path, num_examples: int) -> TrainingArguments:
    steps = -(-num_examples // config.batch_size) * config.epochs
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        warmup_steps=round(steps * config.optim.warmup_fraction),
        lr_scheduler_type="linear",
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // 10),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
    )
