"""Classifying a sentence or a pair of sentences, or giving it a number."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from cloze.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data import Example, both_sets, examples, label_names, majority, mismatched_rows
from finetune.tasks import TASKS, Family
from finetune.train import Prepared, Scores, load_model, load_teacher, max_tokens
from pretrain.export.hugging_face import load_tokenizer

_UNBALANCED = 0.9  # share of one label in data.dev that is warned of
_HEAD = AutoModelForSequenceClassification


def prepare(config: FinetuneConfig) -> Prepared:
    """Shapes of predictions: [N, labels] logits, or [N, 1] numbers."""
    train, dev = (examples(rows, config) for rows in both_sets(config))
    more = examples(rows, config) if (rows := mismatched_rows(config)) else []
    if (train[0].second is None) != (dev[0].second is None):
        raise UserError("data.dev: one of data.train and data.dev has pairs, the other sentences")
    tokenizer = load_tokenizer(Path(config.model))
    regression = TASKS[config.task].family is Family.regression
    names: list[str] = []
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not regression:
        names = label_names([e.label for e in train], [e.label for e in (*dev, *more)], config)
        head = {"names": names}
        share = majority([example.label for example in dev])
        if share > _UNBALANCED:
            many = f"data.dev={config.data.dev}: {share:.1%} of the examples have one label"
            print(f"warning: {many}: accuracy says little, look at macro_f1 and matthews", file=sys.stderr)
    targets = [
        [float(example.label) if regression else names.index(example.label) for example in dataset]
        for dataset in (train, [*dev, *more])
    ]
    gold, num_dev = np.asarray(targets[1]), len(dev)

    def decide(predicted_NL: Any, _: Any) -> list[Any]:
        return list((predicted_NL[:, 0] if regression else predicted_NL.argmax(-1)).tolist())

    def score(answers: Sequence[Any]) -> Scores:
        given = np.asarray(answers)
        if regression:
            return correlations(gold, given)
        found = scores(gold[:num_dev], given[:num_dev], len(names))
        if more:
            found["mismatched_accuracy"] = float(accuracy_score(gold[num_dev:], given[num_dev:]))
        return found

    return Prepared(
        tokenizer=tokenizer,
        make_model=lambda: load_model(config, _HEAD, **head),
        train=_encoded(train, targets[0], tokenizer, max_tokens(config)),
        dev=_encoded([*dev, *more], targets[1], tokenizer, max_tokens(config)),
        collate=DataCollatorWithPadding(tokenizer),
        decide=decide,
        score=score,
        num_labels=len(names) or None,
        teacher=load_teacher(config, _HEAD, names or None, tokenizer),
        facts={"dev_examples": len(dev)}
        | ({"labels": names, "majority": majority([example.label for example in dev])} if names else {}),
    )


def scores(labels_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], num_labels: int) -> Scores:
    """Accuracy, macro F1 and Matthews' correlation (Gorodkin 2004); of two labels, also the F1 of the second."""
    found = {
        "accuracy": accuracy_score(labels_N, predicted_N),
        "macro_f1": f1_score(labels_N, predicted_N, average="macro", zero_division=0.0),
        "matthews": matthews_corrcoef(labels_N, predicted_N),
    }
    if num_labels == 2:
        found["f1"] = f1_score(labels_N, predicted_N, pos_label=1, zero_division=0.0)
    return {name: float(value) for name, value in found.items()}


def correlations(gold_N: npt.NDArray[np.float64], numbers_N: npt.NDArray[np.float64]) -> Scores:
    """Pearson's and Spearman's correlation (0 where all numbers are the same) and the mean squared error."""
    varied = np.ptp(numbers_N) > 0 and np.ptp(gold_N) > 0
    return {
        "pearson": float(pearsonr(gold_N, numbers_N).statistic) if varied else 0.0,
        "spearman": float(spearmanr(gold_N, numbers_N).statistic) if varied else 0.0,
        "mse": float(np.mean((gold_N - numbers_N) ** 2)),
    }


def _encoded(dataset: Sequence[Example], labels: Sequence[float], tokenizer: Any, max_len: int) -> list[dict[str, Any]]:
    firsts = [example.first for example in dataset]
    seconds = [example.second for example in dataset] if dataset[0].second is not None else None
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_len)
    return [{**{key: values[i] for key, values in encoded.items()}, "labels": label} for i, label in enumerate(labels)]
