"""Classifying a sentence or a pair of sentences, or giving it a number: own data, GLUE (Wang et al. 2019, table 1) and
CLUE (Xu et al. 2020, table 2), whose files and whose copies on the hub name their columns differently.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from cloze.log import log
from finetune.data import (
    BadRow,
    Dataset,
    both_sets,
    label_names,
    majority,
    more_sets,
    named_label,
    require_known,
    require_two,
    tell_cut,
)
from finetune.predictor import Encoded, Predictor, Trained, chosen, empty, encoded, texts
from finetune.readers import Columns, Layout, Row
from finetune.tasks import EvaluationSet, Family, Prepared, Scores, Task, TaskConfig

_UNBALANCED = 0.9  # share of one label in data.dev that is warned of


class Example(NamedTuple):
    first: str
    second: str | None  # None: the task is about single sentences
    label: str


def examples(dataset: Dataset, config: TaskConfig, known: Collection[str] | None = None) -> list[Example]:
    """Texts and labels from the columns of the task. Examples that the task calls unlabelled are left out.

    Raises `UserError` for a label that is not among those `known`.
    """
    layout = _layout(dataset, config)

    def parse(row: Row) -> Example | None:
        if not {*layout} <= row.columns.keys():
            raise BadRow(_missing([layout], row))
        values = [row.columns[name] for name in layout]
        for name, value in zip(layout, values, strict=True):
            if isinstance(value, list | dict) or (
                name == layout[-1] and not str("" if value is None else value).strip()
            ):
                raise BadRow(f"{name} is {json.dumps(value)[:40]}; a text is needed there")
        *texts, label = ["" if value is None else str(value) for value in values]
        label = label.strip()
        if config.definition.family is CLASSIFICATION:
            label = re.sub(r"^(-?\d+)\.0+$", r"\1", label)  # pandas makes floats of a column with gaps
        if label in config.definition.unlabelled:
            return None
        where = f"{dataset.name}: {row.place}"
        label = named_label(label, config.data.labels)
        label = _checked_label(label, f"{where}: task={config.task}", config.definition)
        require_known(label, known, where)
        return Example(texts[0], texts[1] if len(texts) > 1 else None, label)

    found = dataset.convert(parse)
    if not found:
        raise UserError(f"{dataset.name}: no example has a label")
    if layout and layout[-1].isdecimal() and len(found) > 2 and dataset.rows[0].place == "line 1":
        labels = Counter(example.label for example in found)
        if labels[found[0].label] == 1 and len(labels) > 2:
            raise UserError(
                f"{dataset.name}: line 1: label {found[0].label!r} stands nowhere else; if that line is a header, name "
                "the columns by data.columns instead of numbering them, or remove it"
            )
    if num_empty := sum("" in (example.first, example.second) for example in found):
        log.warning(
            f"{dataset.name}: {num_empty} of {len(found)} examples have an empty text; they are used as they are"
        )
    return found


def _layout(dataset: Dataset, config: TaskConfig) -> Layout:
    if config.data.columns and len(config.data.columns) not in (2, 3):
        raise UserError(
            f"data.columns={config.data.columns}: two or three names are needed: text, perhaps second text, label"
        )
    whole = next((row for row in dataset.rows if not row.fault), dataset.rows[0])
    layout = config.columns.of(whole)
    if layout is None and not whole.fault:
        raise UserError(f"{dataset.name}: {whole.place}: {_missing(config.columns.layouts, whole)}")
    return layout or ()


def _missing(layouts: Sequence[Layout], row: Row) -> str:
    wanted = " or ".join(", ".join(names) for names in layouts)
    there = ", ".join(filter(None, row.columns)) or "none"
    numbers = ",".join(str(number) for number in range(1, 1 + min(map(len, layouts), default=2)))
    numbered = f" (of a table without a header by number: [{numbers}])" if row.place == "line 2" else ""
    return f"the columns {wanted} are needed, there are {there}; data.columns names others{numbered}"


def _checked_label(label: str, where: str, task: Task) -> str:
    """The label under its name, or the number. Raises `UserError` for one that the task does not have."""
    if task.family is REGRESSION:
        low, high = task.label_range or (float("-inf"), float("inf"))
        try:
            number = float(label)
        except ValueError:
            number = float("nan")
        if not low <= number <= high or abs(number) == float("inf"):
            wanted = f"a number from {low:g} to {high:g}" if low > float("-inf") else "a number"
            raise UserError(f"{where}: label {label!r}: must be {wanted}")
    elif task.labels and label not in task.labels:
        if not (label.isdecimal() and int(label) < len(task.labels)):
            shown = f"{', '.join(task.labels)} or 0 to {len(task.labels) - 1}"
            raise UserError(f"{where}: label {label!r}: must be {shown}; task=classification takes any")
        return task.labels[int(label)]
    return label


def prepare(config: TaskConfig) -> Prepared:
    """Shapes of predictions: [N, labels] logits, or [N, 1] numbers."""
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    from finetune.models import load_encoder_tokenizer, load_model, load_teacher
    from finetune.pooled_classifier import load_trained, pooled_classifier, pooling_beside

    train_set, dev_set = both_sets(config)
    train = examples(train_set, config)
    regression = config.definition.family is REGRESSION
    names: list[str] = []
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not regression:
        names = label_names(train_set, [example.label for example in train], config)
        head = {"names": names}
    known = {example.label for example in train} if names else None
    dev = examples(dev_set, config, known)
    more = {name: examples(dataset, config, known) for name, dataset in more_sets(config).items()}
    for name, dataset in (("dev", dev), *more.items()):
        if (train[0].second is None) != (dataset[0].second is None):
            raise UserError(f"data.{name}: one of data.train and data.{name} has pairs, the other sentences")
    share = majority([example.label for example in dev])
    if not names:
        require_two(train_set, [float(example.label) for example in train], "there is nothing to learn")
        require_two(dev_set, [float(example.label) for example in dev], "scores would say nothing")
    if names:
        require_two(dev_set, [example.label for example in dev], "scores would say nothing")
        if share > _UNBALANCED:
            many = f"{dev_set.name}: {share:.1%} of the examples have one label"
            log.warning(f"{many}: accuracy says little, look at macro_f1 and matthews")
    tokenizer = load_encoder_tokenizer(config)
    pooling = pooling_beside(config)

    def make_model() -> Any:
        if pooling is not None:
            return pooled_classifier(config, pooling, names or None)
        return load_model(config, AutoModelForSequenceClassification, **head)

    def questioned(dataset: Sequence[Example], name: str) -> EvaluationSet:
        return _evaluation_set(dataset, names, _encoded(dataset, names, tokenizer, config.max_len, name))

    return Prepared(
        tokenizer=tokenizer,
        make_model=make_model,
        train=_encoded(train, names, tokenizer, config.max_len, train_set.name),
        dev=questioned(dev, dev_set.name),
        more={name: questioned(dataset, f"data.{name}") for name, dataset in more.items()},
        collate=DataCollatorWithPadding(tokenizer),
        num_labels=len(names) or None,
        teacher=load_teacher(config, AutoModelForSequenceClassification, names or None, tokenizer, load_trained),
        facts={
            "columns": list(_layout(train_set, config)),
            "pairs": train[0].second is not None,
            **({"pooled_head": pooling.value} if pooling is not None else {}),
            **({"labels": names, "majority": share} if names else {}),
        },
    )


def _evaluation_set(
    dataset: Sequence[Example], names: Sequence[str], features: Sequence[dict[str, Any]]
) -> EvaluationSet:
    """Answers are labels or, where there are no `names`, numbers; guessed is the commonest label, or the mean."""
    gold = [example.label if names else float(example.label) for example in dataset]

    def decide(predicted_NL: Any, _: Any) -> list[Any]:
        if names:
            return [names[i] for i in predicted_NL.argmax(-1).tolist()]
        return [float(number) for number in predicted_NL[:, 0]]

    def score(answers: Sequence[Any]) -> Scores:
        if names:
            right, given = (np.asarray([names.index(label) for label in each]) for each in (gold, answers))
            return scores(right, given, len(names))
        return correlations(np.asarray(gold), np.asarray(answers))

    def wrong(predicted_NL: Any, answers: Sequence[Any]) -> list[float]:
        """How sure it is of a wrong label; of numbers by how much they are off."""
        if not names:
            return [abs(answer - right) for answer, right in zip(answers, gold, strict=True)]
        powers_NL = np.exp(predicted_NL.astype(np.float64) - predicted_NL.max(-1, keepdims=True))
        sure_N = powers_NL.max(-1) / powers_NL.sum(-1)
        return [
            float(sure) if answer != right else 0.0 for sure, answer, right in zip(sure_N, answers, gold, strict=True)
        ]

    guess = Counter(gold).most_common(1)[0][0] if names else float(np.mean(np.asarray(gold, dtype=float)))
    texts = [
        {"sentence": example.first} if example.second is None else dict(zip(_PAIR, example[:2], strict=False))
        for example in dataset
    ]
    shown = [{**text, "label": label} for text, label in zip(texts, gold, strict=True)]
    return EvaluationSet(
        features=features, decide=decide, score=score, shown=shown, guess=[guess] * len(dataset), wrong=wrong
    )


def predictor(trained: Trained, first: Row, *, is_regression: bool = False) -> Predictor:
    """The likeliest label and its probability, or the number."""
    layout = chosen(trained.layouts, first)

    def answers(outputs: Sequence[npt.NDArray[np.float32]]) -> list[dict[str, Any]]:
        logits_NL = np.stack(outputs).astype(np.float64)
        if is_regression:
            return [{"prediction": round(number, 6)} for number in logits_NL[:, 0].tolist()]
        powers_NL = np.exp(logits_NL - logits_NL.max(-1, keepdims=True))
        shares_NL = (powers_NL / powers_NL.sum(-1, keepdims=True)).round(6)
        best_N = logits_NL.argmax(-1)
        found: list[dict[str, Any]] = [
            {"prediction": trained.labels[best], "probability": share}
            for best, share in zip(best_N.tolist(), shares_NL.max(-1).tolist(), strict=True)
        ]
        if trained.with_probabilities:
            for answer, shares_L in zip(found, shares_NL.tolist(), strict=True):
                answer["probabilities"] = dict(zip(trained.labels, shares_L, strict=True))
        return found

    def encode(rows: Sequence[Row]) -> Encoded:
        found = texts(rows, layout)
        features, cut = encoded(found, trained)
        return Encoded(features, lambda _, outputs: outputs[0], answers, cut, empty(found))

    more = ("probability", "probabilities")[: 0 if is_regression else 1 + trained.with_probabilities]
    return Predictor(auto_class="AutoModelForSequenceClassification", adds=("prediction", *more), encode=encode)


def scores(labels_N: npt.NDArray[np.int64], predicted_N: npt.NDArray[np.int64], num_labels: int) -> Scores:
    """Accuracy, macro F1 and Matthews' correlation (Gorodkin 2004); of two labels, also the F1 of the second."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

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
    from scipy.stats import pearsonr, spearmanr

    varied = np.ptp(numbers_N) > 0 and np.ptp(gold_N) > 0
    return {
        "pearson": float(pearsonr(gold_N, numbers_N).statistic) if varied else 0.0,
        "spearman": float(spearmanr(gold_N, numbers_N).statistic) if varied else 0.0,
        "mse": float(np.mean((gold_N - numbers_N) ** 2)),
    }


def _encoded(
    dataset: Sequence[Example], names: Sequence[str], tokenizer: Any, max_len: int, name: str
) -> list[dict[str, Any]]:
    firsts = [example.first for example in dataset]
    seconds = [example.second for example in dataset] if dataset[0].second is not None else None
    encoded = tokenizer(firsts, seconds, truncation=True, max_length=max_len)
    tell_cut(name, encoded, max_len)
    labels = [names.index(example.label) if names else float(example.label) for example in dataset]
    return [{**{key: values[i] for key, values in encoded.items()}, "labels": label} for i, label in enumerate(labels)]


def _texts(row: Row, columns: Columns) -> Any:
    return [row.columns[name] for name in (columns.of(row) or ())[:-1]]


_LOADING = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}").eval()
with torch.no_grad():
    logits = model(**tokenizer({texts}, truncation=True, return_tensors="pt")).logits[0]
"""
_POOLED = """import torch
from transformers import AutoTokenizer

from finetune.pooled_classifier import load_pooled  # transformers' own head reads [CLS], this one the mean

tokenizer, model = AutoTokenizer.from_pretrained("{name}"), load_pooled("{name}")
with torch.no_grad():
    logits = model(**tokenizer({texts}, truncation=True, return_tensors="pt")).logits[0]
"""
_LABEL = "print(model.config.id2label[int(logits.argmax())], float(logits.softmax(-1).max()))\n"
_NUMBER = "print(float(logits))\n"
CLASSIFICATION = Family(
    prepare=prepare,
    predictor=predictor,
    text=_texts,
    usage=_LOADING + _LABEL,
    pooled_usage=_POOLED + _LABEL,
    tag="text-classification",
    options=frozenset({"loss", "data.mismatched", "pooling"}),
)
REGRESSION = Family(
    prepare=prepare,
    predictor=partial(predictor, is_regression=True),
    text=_texts,
    usage=_LOADING + _NUMBER,
    pooled_usage=_POOLED + _NUMBER,
    tag="text-classification",
    options=frozenset({"pooling"}),
)

_glue = partial(Task, family=CLASSIFICATION, suite="glue")
_clue = partial(Task, family=CLASSIFICATION, suite="clue")
_SINGLE, _PAIR = ("sentence", "label"), ("sentence1", "sentence2", "label")
_GLUE, _CLUE = "nyu-mll/glue", "clue/clue"
_ENTAILED, _NOT_ENTAILED = "entailment", "not_entailment"
_NEWS = (100, 101, 102, 103, 104, 106, 107, 108, 109, 110, 112, 113, 114, 115, 116)

TASKS: Mapping[str, Task] = {
    "classification": Task(family=CLASSIFICATION, score="accuracy", layouts=(_SINGLE, ("text", "label"), _PAIR)),
    "regression": Task(family=REGRESSION, score="pearson", layouts=(_SINGLE, _PAIR, (*_PAIR[:2], "score"))),
    # GLUE; where F1 counts, it is of the second label
    "cola": _glue(
        score="matthews", labels=("unacceptable", "acceptable"), hub=f"{_GLUE}@cola",
        layouts=(_SINGLE,), header=("source", "label", "star", "sentence"), epochs=5,
    ),
    "sst2": _glue(
        score="accuracy", labels=("negative", "positive"), hub=f"{_GLUE}@sst2", layouts=(_SINGLE,)
    ),
    "mrpc": _glue(
        score="f1", labels=("not_equivalent", "equivalent"), hub=f"{_GLUE}@mrpc",
        layouts=(_PAIR, ("#1 String", "#2 String", "Quality")), epochs=5,
    ),
    "stsb": Task(
        family=REGRESSION, suite="glue", score="pearson", label_range=(0, 5), hub=f"{_GLUE}@stsb",
        layouts=((*_PAIR[:2], "score"), _PAIR), epochs=5,
    ),
    "qqp": _glue(
        score="f1", labels=("not_duplicate", "duplicate"), hub=f"{_GLUE}@qqp",
        layouts=(("question1", "question2", "label"), ("question1", "question2", "is_duplicate")),
    ),
    "mnli": _glue(
        score="accuracy", labels=(_ENTAILED, "neutral", "contradiction"), hub=f"{_GLUE}@mnli", submits_names=True,
        dev_split="validation_matched", mismatched_split="validation_mismatched", unlabelled=("-", "-1"),
        layouts=(("premise", "hypothesis", "label"), (*_PAIR[:2], "gold_label"), _PAIR),
    ),
    "qnli": _glue(
        score="accuracy", labels=(_ENTAILED, _NOT_ENTAILED), hub=f"{_GLUE}@qnli", submits_names=True,
        layouts=(("question", *_SINGLE),),
    ),
    "rte": _glue(
        score="accuracy", labels=(_ENTAILED, _NOT_ENTAILED), hub=f"{_GLUE}@rte", layouts=(_PAIR,),
        submits_names=True, epochs=10,
    ),
    "wnli": _glue(
        score="accuracy", labels=(_NOT_ENTAILED, _ENTAILED), hub=f"{_GLUE}@wnli", layouts=(_PAIR,)
    ),
    # Chinese
    "tnews": _clue(
        score="accuracy", labels=tuple(map(str, _NEWS)), hub=f"{_CLUE}@tnews", layouts=(_SINGLE,)
    ),
    "ocnli": _clue(
        score="accuracy", labels=("neutral", _ENTAILED, "contradiction"), hub=f"{_CLUE}@ocnli",
        layouts=(_PAIR,), unlabelled=("-", "-1"),
    ),
    "chnsenticorp": _clue(
        score="accuracy", labels=("negative", "positive"), hub="lansinuote/ChnSentiCorp",
        layouts=(("text_a", "label"), ("text", "label")), epochs=5,
    ),
}  # fmt: skip
