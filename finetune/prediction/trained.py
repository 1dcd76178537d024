"""What a model's directory says it can do. Imports no torch.

`python -m finetune` leaves metrics.json, which knows the task, its columns and lengths; `finetune.compress` copies it.
Of another directory in Hugging Face's format config.json tells the head, and the key `task` what that does not tell.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloze.errors import UserError
from cloze.files import json_object
from finetune.config import PredictConfig, saved
from finetune.families import TASKS
from finetune.predictor import Trained
from finetune.readers import Layout
from finetune.tasks import Task
from pretrain.export.positions import num_positions

_HEADS = {"ForTokenClassification": "ner", "ForQuestionAnswering": "squad"}
_LONGEST = 512  # tokens, of a model that says nothing


def trained(config: PredictConfig) -> Trained:
    """What `config.model` is, as far as its files and `config` tell. Raises `UserError` where they contradict."""
    from pretrain.export.hugging_face import load_tokenizer

    folder, onnx = _located(Path(config.model))
    described, metrics = json_object(folder / "config.json"), json_object(folder / "metrics.json")
    learned = metrics.get("config")  # other tools, too, have a file of this name
    before = saved(learned) if isinstance(learned, dict) and learned.get("task") in TASKS else None
    name = config.task or (before.task if before else _task_of(described, folder))
    task = TASKS[name] if name and TASKS[name].family.predictor else None
    tokenizer = load_tokenizer(folder, split_into_words=task is not None and "head" in task.family.options)
    positions = num_positions(folder)
    max_len = config.max_len or (before.max_len if before else min(positions or _LONGEST, tokenizer.model_max_length))
    if positions and max_len > positions:
        raise UserError(f"max_len={max_len}: model={folder} has positions for {positions} tokens; lower it")
    return Trained(
        folder=folder,
        onnx=onnx,
        architectures=tuple(described.get("architectures") or ()),
        tokenizer=tokenizer,
        task=name if task else None,
        labels=_labels(described, task, folder),
        layouts=_layouts(config, tuple(metrics.get("columns", ()))[:-1] if task else (), task),
        max_len=max_len,
        stride=before.stride if before else max_len // 4,
        top_sentences=before.top_sentences if before else 3,
        has_no_answer=bool(metrics.get("has_no_answer")),
        conll_columns=tuple(config.columns or (before and before.data.columns) or ()),
        with_probabilities=config.probabilities,
    )


def _located(path: Path) -> tuple[Path, Path | None]:
    """The directory of the model's config.json, and the ONNX file in it where that is what there is to run."""
    if path.suffix == ".onnx":
        folders = [folder for folder in (path.parent, path.parent.parent) if (folder / "config.json").is_file()]
        if not folders or not path.is_file():
            raise UserError(
                f"model={path}: no such file, or no config.json beside it; name what finetune.compress wrote"
            )
        return folders[0], path
    if not (path / "config.json").is_file():  # older directories of sentence-transformers have it a floor below
        path = next((file.parent for file in path.glob("0_*/config.json")), path)
    has_weights = any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    graphs = [file for file in (path / "model.onnx", path / "onnx" / "model.onnx") if file.is_file()]
    return path, graphs[0] if graphs and not has_weights else None


def _task_of(described: Mapping[str, Any], folder: Path) -> str | None:
    """The task whose head the architecture has; None for an encoder, which gives vectors."""
    for architecture in described.get("architectures") or ():
        if architecture.endswith("ForSequenceClassification"):
            if described.get("problem_type") == "multi_label_classification":
                raise UserError(f"model={folder}: gives a text several labels; name a model that gives it one")
            return "regression" if len(_names(described)) == 1 else "classification"
        if task := next((task for head, task in _HEADS.items() if architecture.endswith(head)), None):
            return task
    return None


def _names(described: Mapping[str, Any]) -> tuple[str, ...]:
    names = described.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # two are not written down
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _labels(described: Mapping[str, Any], task: Task | None, folder: Path) -> tuple[str, ...]:
    """The model's own, or the task's, where the model's have numbers for names."""
    names = _names(described)
    if task is None or not task.labels:
        return names
    if len(names) != len(task.labels):
        raise UserError(
            f"model={folder}: has {len(names)} labels ({', '.join(names[:5])}), the task {len(task.labels)}"
        )
    unnamed = all(name in (f"LABEL_{number}", str(number)) for number, name in enumerate(names))
    return tuple(task.labels) if unnamed else names


def _layouts(config: PredictConfig, own: Layout, task: Task | None) -> tuple[Layout, ...]:
    """Columns that rows may have: those asked for, or those of training and then the task's, pairs before texts."""
    if config.columns and not config.columns[0].isdecimal():  # a number is of CoNLL's
        if own and len(config.columns) != len(own):
            raise UserError(f"columns={config.columns}: the model was fine-tuned on {len(own)}: {', '.join(own)}")
        return (tuple(config.columns),)
    known: list[Layout] = [layout[:-1] for layout in task.layouts] if task else [("sentence",)]
    if own:
        known = [own, *(layout for layout in known if len(layout) == len(own))]
    if any(len(layout) == 1 for layout in known):
        known.append(("text",))  # as the lines of a text are called
    return tuple(dict.fromkeys(sorted(known, key=len, reverse=True)))
