"""Does a masked-LM prefer grammatical sentences? Accuracy on minimal pairs, beside what word frequencies alone give.

A pair is right where the good sentence scores higher; ties count half. The headline is the gain over frequencies, and
agreement: many contrasts are decided by which sentence has the commoner words, and a model that knows nothing else is
far from 50% there. Knows pairs and scores; knows neither models nor runs.

Shapes: P pairs; 2 is (good, bad).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cloze.errors import UserError
from pretrain.evaluate.frequencies import log_likelihoods
from pretrain.evaluate.pair_files import Paradigm
from pretrain.evaluate.pll import F64, I64, Encoded, Metric, Scorer, encode
from pretrain.evaluate.results import AGREEMENT, FREQUENCIES, GAIN, OVERALL

EQUAL_LENGTH, SHUFFLED = "equal_length", "shuffled_labels"
_SHUFFLE_SEED = 0


class Estimate(NamedTuple):
    """A mean, and how far off it may be."""

    value: float
    standard_error: float
    sampling_error: float  # of several paradigms: what the pairs drawn alone make uncertain


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """Minimal pairs of several paradigms, encoded, in the paradigms' order."""

    paradigms: Sequence[Paradigm]
    encoded: Sequence[tuple[Encoded, Encoded]]

    @cached_property
    def bounds(self) -> list[slice]:
        """Where each paradigm's pairs are."""
        ends = np.cumsum([0, *(len(paradigm.pairs) for paradigm in self.paradigms)]).tolist()
        return [slice(start, end) for start, end in pairwise(ends)]

    @cached_property
    def lengths_Px2(self) -> I64:
        """Scored tokens."""
        return np.asarray([[text.num_scored for text in pair] for pair in self.encoded], np.int64)

    @cached_property
    def same_P(self) -> Any:
        """Bool: pairs that are the same to the tokenizer. They tie, whatever the last bits of their scores."""
        return np.asarray([np.array_equal(good.ids_T, bad.ids_T) for good, bad in self.encoded])

    @cached_property
    def flipped_P(self) -> Any:
        """Bool: which pairs the control takes the other way round, half of them."""
        return np.random.default_rng(_SHUFFLE_SEED).random(len(self.encoded)) < 0.5

    def unknown_share(self, unk_id: int) -> float:
        """Of the scored tokens, those that are [UNK]."""
        unknown = sum(int((text.ids_T == unk_id).sum()) for pair in self.encoded for text in pair)
        return unknown / int(self.lengths_Px2.sum())


def encode_pairs(paradigms: Sequence[Paradigm], backend: Any, max_positions: int) -> PairSet:
    """Raises `UserError` for a sentence that is longer than the model, or of which the tokenizer leaves nothing."""
    pairs = [pair for paradigm in paradigms for pair in paradigm.pairs]
    texts = encode(backend, [side for pair in pairs for side in (pair.good, pair.bad)])
    for number, text in enumerate(texts):
        place = pairs[number // 2].place
        if len(text.ids_T) > max_positions:
            raise UserError(
                f"{place}: {len(text.ids_T)} tokens, and the model has {max_positions} positions; shorten it"
            )
        if not text.num_scored:
            raise UserError(f"{place}: the tokenizer leaves nothing of a sentence; mend it")
    return PairSet(paradigms=paradigms, encoded=list(zip(texts[::2], texts[1::2], strict=True)))


def frequency_scores(pairs: PairSet, counts_V: I64) -> F64:
    """Log-likelihoods by the counts of each token in a corpus, [P, 2]."""
    return log_likelihoods(counts_V, [text for pair in pairs.encoded for text in pair]).reshape(-1, 2)


def score_pairs(pairs: PairSet, scorer: Scorer, metrics: Sequence[Metric]) -> dict[Metric, F64]:
    """Pseudo-log-likelihoods, [P, 2] by metric. Collective where the scorer is."""
    scores = scorer.score(pairs.encoded, metrics).reshape(-1, 2, len(metrics))
    return {metric: scores[:, :, number] for number, metric in enumerate(metrics)}


def preferred(pairs: PairSet, scores_Px2: F64) -> F64:
    """1 where the good sentence scores higher, 0.5 where neither does (or a score is not a number), else 0."""
    difference_P = scores_Px2[:, 0] - scores_Px2[:, 1]
    difference_P[pairs.same_P] = 0
    return (1 + np.sign(np.nan_to_num(difference_P, nan=0.0))) / 2


def columns_of(pairs: PairSet, scores: Mapping[Metric, F64], frequencies_Px2: F64 | None) -> dict[str, F64]:
    """Per pair, by name of the column; NaN where a column does not speak of a pair.

    Of each metric and of frequencies: the sum, and `…_per_token` the mean over a sentence's tokens, so that the longer
    one is at no disadvantage. `equal_length` is the first metric on pairs of equally many tokens, `shuffled_labels` the
    control: which of two is called good is drawn. `gain` is the first metric minus frequencies.
    """
    by_name = {metric.value: values for metric, values in scores.items()}
    first, *_ = by_name
    if frequencies_Px2 is not None:
        by_name[FREQUENCIES] = frequencies_Px2
    found = {}
    for name, values_Px2 in by_name.items():
        found[name] = preferred(pairs, values_Px2)
        found[f"{name}_per_token"] = preferred(pairs, values_Px2 / pairs.lengths_Px2)
    if frequencies_Px2 is not None:
        found[GAIN] = found[first] - found[FREQUENCIES]
    found[EQUAL_LENGTH] = np.where(pairs.lengths_Px2[:, 0] == pairs.lengths_Px2[:, 1], found[first], np.nan)
    found[SHUFFLED] = np.where(pairs.flipped_P, 1 - found[first], found[first])
    return found


def summary(pairs: PairSet, columns: Mapping[str, F64]) -> dict[str, dict[str, dict[str, Any]]]:
    """{"groups": {name: row}, "phenomena": …, "fields": …, "paradigms": …}; a row has counts and `Estimate`s.

    Of a paradigm: the mean over its pairs. Of several: the mean over paradigms, whose spread gives the standard error.
    """
    paradigms, numbers = pairs.paradigms, range(len(pairs.paradigms))
    everything = {OVERALL: [*numbers]}
    agreement = [number for number in numbers if paradigms[number].is_agreement]
    groups = {
        "groups": everything | ({AGREEMENT: agreement} if agreement else {}),
        "fields": _grouped(paradigm.field for paradigm in paradigms),
        "phenomena": _grouped(paradigm.phenomenon for paradigm in paradigms),
        "paradigms": {paradigm.name: [number] for number, paradigm in enumerate(paradigms)},
    }
    own = {name: [_mean(values_P[bound]) for bound in pairs.bounds] for name, values_P in columns.items()}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, members in groups.items():
        found[kind] = {}
        for name, those in members.items():
            row: dict[str, Any] = {"pairs": sum(len(paradigms[number].pairs) for number in those)}
            row["paradigms"] = len(those)
            for column, estimates in own.items():
                if (estimate := _over([estimates[number] for number in those])) is not None:
                    row[column] = estimate
            found[kind][name] = row
    return found


def _grouped(names: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        if name:
            found.setdefault(name, []).append(number)
    return found


def _mean(values: F64) -> Estimate | None:
    """Over pairs; of right and wrong ones, the binomial standard error."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    error = float(values.std() / math.sqrt(len(values)))
    return Estimate(float(values.mean()), error, error)


def _over(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """The mean over paradigms."""
    there = [estimate for estimate in estimates if estimate is not None]
    if len(there) < 2:
        return there[0] if there else None
    values = np.asarray([estimate.value for estimate in there])
    sampling = math.sqrt(sum(estimate.sampling_error**2 for estimate in there)) / len(there)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), sampling)


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[Metric]) -> list[str]:
    """The summary for people, in percent."""
    first = metrics[0].value
    heads = {first: "PLL", FREQUENCIES: "frequencies", GAIN: "gain", f"{first}_per_token": "per token"}
    heads |= {metric.value: "token PLL" for metric in metrics[1:]}
    overall = found["groups"][OVERALL]
    shown = [column for column in heads if column in overall]
    rows = [["", "pairs", *(heads[column] for column in shown)]]
    for kind, members in found.items():
        if kind != "groups" and members:
            rows.append([kind, "", *("" for _ in shown)])
        for name, row in members.items():
            label = name if kind == "groups" else f"  {name}"
            rows.append([label, f"{row['pairs']:,}", *(_percent(row.get(column), column == GAIN) for column in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *aligned]).rstrip())
    drawn = overall[first].sampling_error * 100
    lines += [
        "",
        f"percent ± standard error over paradigms (of one: over pairs); by the pairs drawn alone ± {drawn:.1f}",
    ]
    if EQUAL_LENGTH in overall:
        lines.append(f"pairs of equally many tokens: {_percent(overall[EQUAL_LENGTH])}")
    lines.append(f"control, labels shuffled: {_percent(overall[SHUFFLED])} (50 expected)")
    return lines


def _percent(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value * 100:{'+' if signed else ''}.1f} ± {estimate.standard_error * 100:.1f}"


def headline(found: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: Metric) -> dict[str, float]:
    """What a run keeps of an evaluation, by name of the metric below `eval/`."""
    result = {}
    for group, place in ((OVERALL, "grammar"), (AGREEMENT, "grammar_agreement")):
        row = found["groups"].get(group, {})
        for column, name in ((metric.value, "accuracy"), (FREQUENCIES, "frequencies_accuracy"), (GAIN, "gain")):
            if column in row:
                result[f"{place}_{name}"] = row[column].value
    result["grammar_sampling_error"] = found["groups"][OVERALL][metric.value].sampling_error
    for phenomenon, row in found["phenomena"].items():
        result[f"grammar/{phenomenon}"] = row[metric.value].value
    return result
