"""Has a model left the plateau of word frequencies, or is it sick? A verdict on a run's losses, one line of advice.

A fresh BERT first learns how frequent words are, then what a text is about, and stays there, for tens of millions of
tokens where nothing helps it to learn which tokens are near (docs/stuck.md). Its loss looks as if it had converged.
Pure: evaluations in, words out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.evaluate.baseline import Baseline

LEFT_NATS = 0.7  # below the frequencies' entropy: what frequencies and topic together gave stayed within 0.5 of it
_PATIENCE_TOKENS = 3_000_000  # the best recipe leaves the plateau in 2 million; before that there is nothing to say
_TOPIC_NATS = 0.15  # below the frequencies' entropy: who knows topics is further down after a million tokens
_TOPIC_TOKENS = 1_000_000
_EARLIER_SHARE = 0.75  # of the tokens: against evaluations up to there a loss falls or stands still
_FLAT_NATS = 0.1  # a loss that fell by less stands still
_DIVERGED_NATS = 0.5  # above the frequencies' entropy: in the trap a high rate's noise alone costs 0.3
_BLIND = 2.0  # times the frequencies' entropy: no model that guesses blindly is so bad, whatever its vocabulary
_EASY_SHARE = 0.15  # of the frequencies' entropy: large models of natural text stay above a sixth of it
_UNLIKE_SHARE = 0.5  # of the held-out loss: no text is so much easier in training than another of its kind


class Evaluation(NamedTuple):
    """One held-out evaluation of a run."""

    tokens: int  # consumed in training until then
    mlm_loss: float  # nats per masked token
    train_loss: float | None = None  # the same of the last line of metrics before it


class Verdict(NamedTuple):
    """Where a run stands against its baseline."""

    state: str  # "early", "plateau", "left", or a sickness: "diverged", "trapped", "slow", "easy", "unlike"
    left_at_tokens: int | None  # at the first evaluation off the plateau
    line: str  # for people

    @property
    def is_trouble(self) -> bool:
        return self.state not in ("early", "left")


def evaluations_of(rows: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """Those in rows of metrics.jsonl, in order; a loss that is not finite stands there as null."""
    found, train_loss = [], None
    for row in rows:
        if "train/mlm_loss" in row:
            train_loss = _number(row["train/mlm_loss"])
        if "eval/mlm_loss" in row and isinstance(row.get("tokens"), int | float):
            loss = _number(row["eval/mlm_loss"])
            found.append(Evaluation(int(row["tokens"]), math.nan if loss is None else loss, train_loss))
    return found


def judge(evaluations: Sequence[Evaluation], baseline: Baseline) -> Verdict | None:
    """The verdict on evaluations in the order of training; None where there is none."""
    if not evaluations:
        return None
    last = evaluations[-1]
    left = next((e.tokens for e in evaluations if e.mlm_loss <= baseline.mlm_loss - LEFT_NATS), None)
    against = f"held-out MLM loss {last.mlm_loss:.3f}, word frequencies alone {baseline.mlm_loss:.3f}"
    if sick := _sickness(evaluations, baseline, against):
        return Verdict(sick[0], left, sick[1])
    if left is not None and last.mlm_loss <= baseline.mlm_loss - LEFT_NATS:
        return Verdict("left", left, f"off the plateau since {left / 1e6:.1f}M tokens: {against}")
    if last.tokens < _PATIENCE_TOKENS:
        return Verdict("early", left, f"{against}: too early to tell")
    if left is not None:
        return Verdict(
            "plateau",
            left,
            f"back on the plateau, which it had left at {left / 1e6:.1f}M tokens: {against}; lower optim.lr",
        )
    return Verdict(
        "plateau",
        None,
        f"on the plateau: {against}: it knows frequencies and topics, not word order. Try recipe=fast (a distance bias "
        "that is annealed away), a higher optim.lr, or more steps; docs/stuck.md tells which",
    )


def _sickness(evaluations: Sequence[Evaluation], baseline: Baseline, against: str) -> tuple[str, str] | None:
    """State and line of what more steps will not mend."""
    last, frequencies = evaluations[-1], baseline.mlm_loss
    above = last.mlm_loss - frequencies
    if last.train_loss is not None and last.train_loss < _UNLIKE_SHARE * last.mlm_loss:
        return "unlike", (
            f"far better in training, MLM loss {last.train_loss:.3f}: {against}; what it must predict can be seen "
            "there (data.mask_share, data.random_share), or the training text repeats: see the corpus' diagnosis"
        )
    if last.mlm_loss < _EASY_SHARE * frequencies:
        return "easy", (
            f"too good to be true: {against}; the held-out text stands in the training text, or what it must predict "
            "can be seen: see repeated_lines and leakage in the corpus' diagnosis"
        )
    earlier = [e.mlm_loss for e in evaluations if e.tokens <= _EARLIER_SHARE * last.tokens]
    falls = bool(earlier) and last.mlm_loss < min(earlier) - _FLAT_NATS
    rose = above > _DIVERGED_NATS and last.mlm_loss > min(earlier, default=math.inf) + _DIVERGED_NATS
    patience = _TOPIC_TOKENS if earlier else _PATIENCE_TOKENS
    lost = above > _DIVERGED_NATS and last.tokens >= patience and not falls
    blind = last.mlm_loss > _BLIND * frequencies
    if not math.isfinite(last.mlm_loss) or blind or rose or lost:
        return "diverged", f"diverged: {against}: worse than guessing; lower optim.lr or lengthen the warm-up"
    reads_no_text = above > -_TOPIC_NATS and (last.train_loss is None or last.train_loss > frequencies - _TOPIC_NATS)
    if not earlier or last.tokens < _TOPIC_TOKENS or not reads_no_text:
        return None
    if falls:
        return "slow", (
            f"slow: {against}, and falling: it has not yet learned how frequent words are; a higher optim.lr, or a "
            "shorter warm-up where it is past it"
        )
    return "trapped", (
        f"trapped: {against}, and standing still: it predicts words by how frequent they are, whatever the text; "
        "optim.lr is far too high, and it does not come out by itself: start again with a lower one (or is far too low)"
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
