"""Frozen probes: what a linear model reads off the states of each layer, beside random weights.

The encoder is not touched. A logistic regression learns labels (Alain and Bengio 2017), of two texts u and v from
|u - v| and u * v (Conneau and Kiela 2018), tags from the state of each word's first token; a ridge regression learns
similarity, which the cosine of the two vectors tells without learning, too. Intervals are bootstrapped over the
examples that are tested, of tagged words over their sentences.
Shapes: N examples, L layers and the embeddings below them, H width, K labels, B draws.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloze.errors import UserError
from cloze.log import log
from pretrain.evaluate import confidence
from pretrain.evaluate.confidence import Interval
from pretrain.evaluate.frozen_config import ProbesConfig
from pretrain.evaluate.probe_data import PROBES, Example, find_files, read
from pretrain.evaluate.states import Encoder, encode, load_encoder, random_encoder, text_states, word_states
from pretrain.export.card import table

Floats = npt.NDArray[np.float64]
Draws = npt.NDArray[np.int64]

NO_TAG = "O"
_NAMES = {"accuracy": "accuracy", "matthews": "Matthews' correlation", "spearman": "Spearman", "tag_f1": "F1 of tags"}


class LayerScore(NamedTuple):
    """In percent."""

    model: Interval
    random: tuple[float, ...]  # of each seed
    gain: Interval | None  # over the mean of the seeds


class ProbeResult(NamedTuple):
    task: str
    metric: str
    num_learned: int  # examples, or words
    num_tested: int
    trivial: float  # always the same answer, %
    layers: Sequence[LayerScore]  # the embeddings, then the layers


@dataclass(frozen=True, kw_only=True)
class _Set:
    """The examples of a task, of which `train` are learned from and `test` tested; no test: cross-validation."""

    task: str
    examples: Sequence[Example]
    num_train: int


class _Vectors(NamedTuple):
    """What is classified: rows of each layer, and from which example each is."""

    rows_LxMxH: npt.NDArray[np.float32]
    second_LxMxH: npt.NDArray[np.float32] | None  # of the second text
    example_M: npt.NDArray[np.int64]
    labels: Sequence[Any]


def run_probes(config: ProbesConfig) -> list[ProbeResult]:
    """All tasks, one after another. Raises `UserError` for what cannot be read or learned."""
    folder = Path(config.data)
    if not folder.is_dir():
        raise UserError(f"data={folder}: no such directory; name the one that holds the tasks' files")
    for task in config.tasks or ():
        if task not in PROBES:
            raise UserError(f"tasks: no task {task}; there are {', '.join(PROBES)}")
    found = {task: files for task in config.tasks or PROBES if (files := find_files(folder, task))}
    for task in config.tasks or ():
        if task not in found:
            raise UserError(f"data={folder}: has no files of {task}; {PROBES[task].wanted} is needed there")
    if not found:
        raise UserError(f"data={folder}: has the files of no task; sst2/train.tsv and sst2/dev.tsv are some")
    sets = [_sampled(task, *files, config) for task, files in found.items()]
    encoder = load_encoder(Path(config.model), config.max_len)
    others = [random_encoder(encoder, config.seed + number) for number in range(config.random_seeds)]
    return [result for one in sets for result in _probe(one, encoder, others, config)]


def markdown(results: Sequence[ProbeResult]) -> str:
    """A table for each task, a row for each layer."""
    parts = []
    for result in results:
        with_random = bool(result.layers[0].random)
        head = ["layer", "this model", *(["random weights", "gain"] if with_random else [])]
        rows = []
        for number, layer in enumerate(result.layers):
            cells = [str(number) if number else "embeddings", _with_interval(layer.model)]
            if with_random:
                assert layer.gain
                spread = f" ± {np.std(layer.random, ddof=1):.1f}" if len(layer.random) > 1 else ""
                cells += [f"{np.mean(layer.random):.1f}{spread}", _with_interval(layer.gain, "+")]
            rows.append(cells)
        told = f"{result.num_learned:,} learned from, {result.num_tested:,} tested"
        same = f"; always the same answer {result.trivial:.1f}" if result.trivial else ""
        parts.append(f"{result.task}: {result.metric}, %; {told}{same}\n\n{table(head, rows)}")
    return "\n".join(parts)


def as_data(results: Sequence[ProbeResult]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**result._asdict(), "layers": [layer._asdict() for layer in result.layers]} for result in results]


def _with_interval(interval: Interval, sign: str = "") -> str:
    value, low, high = interval
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _sampled(task: str, train_files: Sequence[str], test_files: Sequence[str], config: ProbesConfig) -> _Set:
    """At most so many examples (of words: sentences that hold so many) of each part, drawn at random."""
    rng = np.random.default_rng(config.seed)
    parts: list[list[Example]] = []
    seen: set[Any] = set()
    for files in filter(None, (train_files, test_files)):
        examples = read(task, files)
        is_tagged = PROBES[task].metric == "tag_f1"
        labels = {label for one in examples for label in (one.label if isinstance(one.label, tuple) else [one.label])}
        if parts and PROBES[task].metric != "spearman" and (unseen := labels - seen):
            raise UserError(
                f"{files[0]}: has labels that are not in {train_files[0]}: {', '.join(sorted(map(str, unseen))[:5])}"
            )
        seen |= labels
        if len(seen) < 2:
            raise UserError(f"{files[0]}: has one label only, {next(iter(seen))!r}; there is nothing to learn")
        order = rng.permutation(len(examples))
        if is_tagged:
            ends = np.cumsum([len(examples[at].texts) for at in order])
            order = order[: int(np.searchsorted(ends, config.words)) + 1]
        else:
            order = order[: config.samples]
        parts.append([examples[at] for at in order])
    both = [example for part in parts for example in part]
    return _Set(task=task, examples=both, num_train=len(parts[0]) if test_files else 0)


def _probe(one: _Set, encoder: Encoder, others: Sequence[Encoder], config: ProbesConfig) -> list[ProbeResult]:
    log.info(f"{one.task}: {len(one.examples):,} examples, {1 + len(others)} models")
    metric = PROBES[one.task].metric
    vectors = [_vectors(one, each, config, one.task if each is encoder else "") for each in (encoder, *others)]
    example_M, labels = vectors[0].example_M, vectors[0].labels
    is_train_M = example_M < one.num_train
    tested = np.arange(len(one.examples))[one.num_train :]
    drawn_BxN = confidence.draw_examples(len(tested), config.seed)
    if metric != "spearman":
        names = sorted({*labels})
        numbers_M = np.asarray([names.index(label) for label in labels])
        split = _split(is_train_M, numbers_M, config)
        own_M = example_M[split[1]] - one.num_train if one.num_train else example_M[split[1]]
        units = np.searchsorted(np.unique(own_M), own_M)
        scorer = _Confusion(metric, names, drawn_BxN, units)
        guessed = [
            [_classified(features, numbers_M, split, config) for features in _features(each)] for each in vectors
        ]
        answers = [[scorer.scores(numbers_M[split[1]], given) for given in layers] for layers in guessed]
        common = np.bincount(numbers_M[is_train_M] if one.num_train else numbers_M).argmax()
        trivial = 100 * float(scorer.scores(numbers_M[split[1]], np.full(len(split[1]), common))[0])
        num_learned = int(is_train_M.sum()) if one.num_train else len(labels) * (config.folds - 1) // config.folds
        return [_result(one.task, metric, (num_learned, len(split[1]), trivial), answers)]
    gold_M = np.asarray(labels, np.float64)
    results = []
    for name, predict in (("cosine", _cosine), ("ridge", _ridge)):
        answers = [
            [
                confidence.spearman(gold_M[~is_train_M], predict(each, layer, gold_M, is_train_M, config), drawn_BxN)
                for layer in range(len(each.rows_LxMxH))
            ]
            for each in vectors
        ]
        learned = int(is_train_M.sum()) if name == "ridge" else 0
        results.append(_result(f"{one.task}, {name}", metric, (learned, len(tested), 0.0), answers))
    return results


def _result(task: str, metric: str, facts: tuple[int, int, float], answers: Sequence[Sequence[Floats]]) -> ProbeResult:
    """`answers`: of each model and each layer the scores of the draws."""
    layers = []
    for own_B, *random in zip(*answers, strict=True):
        gain = confidence.interval(100 * (own_B - np.mean(random, axis=0))) if random else None
        layers.append(
            LayerScore(confidence.interval(100 * own_B), tuple(100 * float(scores[0]) for scores in random), gain)
        )
    return ProbeResult(task, _NAMES[metric], *facts, layers)


def _vectors(one: _Set, encoder: Encoder, config: ProbesConfig, name: str) -> _Vectors:
    examples = one.examples
    if PROBES[one.task].metric == "tag_f1":
        encoded = encode(encoder, [example.texts for example in examples], name)
        states, kept = word_states(encoder, encoded)
        example_M = np.repeat(np.arange(len(examples)), [len(words) for words in kept])
        tags = [example.label[word] for example, words in zip(examples, kept, strict=True) for word in words]  # type: ignore[index]
        return _Vectors(states, None, example_M, tags)
    sides = [
        text_states(encoder, encode(encoder, texts, name), config.pooling)
        for texts in zip(*(example.texts for example in examples), strict=True)
    ]
    labels = [example.label for example in examples]
    return _Vectors(sides[0], sides[1] if len(sides) > 1 else None, np.arange(len(examples)), labels)


def _features(vectors: _Vectors) -> Sequence[npt.NDArray[np.float32]]:
    """Of each layer; of pairs |u - v| and u * v."""
    if vectors.second_LxMxH is None:
        return list(vectors.rows_LxMxH)
    return [_pair(u, v) for u, v in zip(vectors.rows_LxMxH, vectors.second_LxMxH, strict=True)]


def _pair(first_MxH: npt.NDArray[np.float32], second_MxH: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.concatenate([np.abs(first_MxH - second_MxH), first_MxH * second_MxH], axis=1)


_Split = tuple[Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], npt.NDArray[np.int64]]


def _split(is_train_M: npt.NDArray[np.bool_], numbers_M: npt.NDArray[np.int64], config: ProbesConfig) -> _Split:
    """(what is learned from and what is tested, of each fold; the tested rows in order)."""
    from sklearn.model_selection import StratifiedKFold

    if is_train_M.any():
        tested = np.flatnonzero(~is_train_M)
        return [(np.flatnonzero(is_train_M), tested)], tested
    folds = StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a label rarer than there are folds
        return list(folds.split(numbers_M, numbers_M)), np.arange(len(numbers_M))


def _classified(
    features_MxF: npt.NDArray[np.float32], numbers_M: npt.NDArray[np.int64], split: _Split, config: ProbesConfig
) -> npt.NDArray[np.int64]:
    """The label that is given to each tested row."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    given_M = np.zeros(len(numbers_M), np.int64)
    for learned, tested in split[0]:
        train, test = _standardized(features_MxF[learned], features_MxF[tested])
        model = LogisticRegression(C=1 / config.regularization, tol=1e-3, max_iter=200)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digit of a coefficient decides no label
            given_M[tested] = model.fit(train, numbers_M[learned]).predict(test)
    return given_M[split[1]]


def _standardized(
    train_MxF: npt.NDArray[np.float32], test_MxF: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Each feature with mean 0 and deviation 1 in what is learned from."""
    mean_F, deviation_F = train_MxF.mean(0), train_MxF.std(0) + 1e-6
    return (train_MxF - mean_F) / deviation_F, (test_MxF - mean_F) / deviation_F


_Predict = Callable[[_Vectors, int, Floats, npt.NDArray[np.bool_], ProbesConfig], Floats]


def _cosine(vectors: _Vectors, layer: int, gold_M: Floats, is_train_M: npt.NDArray[np.bool_], _: Any) -> Floats:
    """Nothing is learned. A vector of length 0 is like nothing: 0."""
    assert vectors.second_LxMxH is not None
    u, v = vectors.rows_LxMxH[layer][~is_train_M], vectors.second_LxMxH[layer][~is_train_M]
    scale = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    return np.asarray((u * v).sum(1) / np.maximum(scale, 1e-12), np.float64)


def _ridge(
    vectors: _Vectors, layer: int, gold_M: Floats, is_train_M: npt.NDArray[np.bool_], config: ProbesConfig
) -> Floats:
    from sklearn.linear_model import Ridge

    assert vectors.second_LxMxH is not None
    features = _pair(vectors.rows_LxMxH[layer], vectors.second_LxMxH[layer])
    train, test = _standardized(features[is_train_M], features[~is_train_M])
    return np.asarray(Ridge(alpha=config.regularization).fit(train, gold_M[is_train_M]).predict(test), np.float64)


class _Confusion:
    """Scores of draws of examples (of sentences, where words are tagged) from counts of (label, given label)."""

    def __init__(self, metric: str, names: Sequence[str], drawn_BxN: Draws, unit_M: npt.NDArray[np.int64]) -> None:
        self._metric, self._names, self._unit_M = metric, names, unit_M
        self._times_BxN = confidence.times_drawn(drawn_BxN)

    def scores(self, gold_M: npt.NDArray[np.int64], given_M: npt.NDArray[np.int64]) -> Floats:
        num_labels = len(self._names)
        counts = np.zeros((self._times_BxN.shape[1], num_labels * num_labels))
        np.add.at(counts, (self._unit_M, gold_M * num_labels + given_M), 1)
        drawn = (self._times_BxN @ counts).reshape(-1, num_labels, num_labels)
        if self._metric == "matthews":
            return matthews(drawn)
        if self._metric == "tag_f1":
            return tag_f1(drawn, self._names.index(NO_TAG) if NO_TAG in self._names else None)
        return np.asarray(np.trace(drawn, axis1=1, axis2=2) / drawn.sum((1, 2)))


def matthews(confusion_BxKxK: Floats) -> Floats:
    """Matthews' correlation for any number of labels (Gorodkin 2004), [B]; 0 where all answers, or labels, are one."""
    total_B = confusion_BxKxK.sum((1, 2))
    gold_BxK, given_BxK = confusion_BxKxK.sum(2), confusion_BxKxK.sum(1)
    right_B = np.trace(confusion_BxKxK, axis1=1, axis2=2)
    covariance_B = right_B * total_B - (gold_BxK * given_BxK).sum(1)
    scale_B = np.sqrt((total_B**2 - (gold_BxK**2).sum(1)) * (total_B**2 - (given_BxK**2).sum(1)))
    return np.asarray(np.divide(covariance_B, scale_B, out=np.zeros_like(scale_B), where=scale_B > 0))


def tag_f1(confusion_BxKxK: Floats, outside: int | None) -> Floats:
    """F1 over single words of all tags but `outside` ("O") together, [B]; 0 where there are none."""
    right_B = np.trace(confusion_BxKxK, axis1=1, axis2=2)
    both_B = 2 * confusion_BxKxK.sum((1, 2))
    if outside is not None:
        right_B = right_B - confusion_BxKxK[:, outside, outside]
        both_B = both_B - confusion_BxKxK[:, outside].sum(1) - confusion_BxKxK[:, :, outside].sum(1)
    return np.asarray(np.divide(2 * right_B, both_B, out=np.zeros_like(both_B), where=both_B > 0))
