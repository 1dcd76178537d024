"""Answering a question by a span of its context (SQuAD): long contexts in overlapping windows, exact match and F1.

A context without an answer points at [CLS], as in BERT's run for SQuAD 2.0 (Devlin et al. 2019, section 4.3).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from cloze.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data import Question, both_sets, questions
from finetune.train import Prepared, Scores, load_model, load_teacher, max_tokens
from pretrain.export.hugging_face import load_tokenizer

_HEAD = AutoModelForQuestionAnswering
_MAX_ANSWER = 30  # tokens of an answer at most
_PUNCTUATION = re.compile(rf"[{re.escape(string.punctuation)}\u3000-\u303f\uff00-\uffef]")  # ASCII, Chinese

Offsets = list[tuple[int, int] | None]  # characters of each token of the context; None: not of the context


def prepare(config: FinetuneConfig) -> Prepared:
    """Shapes of predictions: a pair of [windows, T] logits, of starts and of ends."""
    train, dev = (questions(rows) for rows in both_sets(config))
    tokenizer = load_tokenizer(Path(config.model))
    limit = max_tokens(config)
    train_features, _, _ = windows(train, tokenizer, limit, config.stride)
    dev_features, owners, offsets = windows(dev, tokenizer, limit, config.stride)
    with_none = any(not question.answers for question in train)

    def decide(logits: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], _: Any) -> list[str]:
        best: dict[int, tuple[float, str]] = {}
        nothing: dict[int, float] = {}
        for starts_T, ends_T, owner, own in zip(*logits, owners, offsets, strict=True):
            candidate = best_span(starts_T[: len(own)], ends_T[: len(own)], own, dev[owner].context)
            best[owner] = max(best.get(owner, (-np.inf, "")), candidate)
            nothing[owner] = min(nothing.get(owner, np.inf), float(starts_T[0] + ends_T[0]))
        return ["" if with_none and nothing[i] > best[i][0] else best[i][1] for i in range(len(dev))]

    return Prepared(
        tokenizer=tokenizer,
        make_model=lambda: load_model(config, _HEAD),
        train=train_features,
        dev=dev_features,
        collate=DataCollatorWithPadding(tokenizer),
        decide=decide,
        score=lambda answers: answer_scores(answers, [question.answers for question in dev]),
        label_columns=("start_positions", "end_positions"),
        teacher=load_teacher(config, _HEAD, None, tokenizer),
        facts={"dev_examples": len(dev), "dev_windows": len(dev_features)},
    )


def windows(
    dataset: Sequence[Question], tokenizer: Any, max_len: int, stride: int
) -> tuple[list[dict[str, Any]], list[int], list[Offsets]]:
    """Features of question and window, the question that each belongs to, and where its context's tokens stand."""
    pairs = [question.question.strip() for question in dataset], [question.context for question in dataset]
    longest = max(len(ids) for ids in tokenizer(pairs[0], add_special_tokens=False).input_ids)
    if longest + 3 + stride >= max_len:
        raise UserError(f"max_len={max_len}: a question has {longest} tokens; raise max_len, or lower stride={stride}")
    encoded = tokenizer(
        *pairs, truncation="only_second", max_length=max_len, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    owners, all_offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    features, kept = [], []
    for i, owner in enumerate(owners):
        of_context = [part == 1 for part in encoded.sequence_ids(i)]
        offsets: Offsets = [span if own else None for span, own in zip(all_offsets[i], of_context, strict=True)]
        start, end = _answer_tokens(dataset[owner], offsets)
        own = {key: values[i] for key, values in encoded.items()}
        features.append({**own, "start_positions": start, "end_positions": end})
        kept.append(offsets)
    return features, owners, kept


def _answer_tokens(question: Question, offsets: Offsets) -> tuple[int, int]:
    """First and last token of the answer, or [CLS] twice where the window does not hold all of it."""
    context = [i for i, span in enumerate(offsets) if span]
    if not question.answers or not context:
        return 0, 0
    first, after = question.start, question.start + len(question.answers[0])
    begins, ends = zip(*(offsets[i] or (0, 0) for i in context), strict=True)
    if begins[0] > first or ends[-1] < after:
        return 0, 0
    return context[sum(begin <= first for begin in begins) - 1], context[sum(end < after for end in ends)]


def best_span(
    starts_T: npt.NDArray[np.float32], ends_T: npt.NDArray[np.float32], offsets: Offsets, context: str
) -> tuple[float, str]:
    """(start logit + end logit, text) of the best span of the context of at most `_MAX_ANSWER` tokens."""
    allowed_T = np.array([span is not None for span in offsets])
    lengths_TT = np.arange(len(offsets))[None, :] - np.arange(len(offsets))[:, None]
    spans_TT = (lengths_TT >= 0) & (lengths_TT < _MAX_ANSWER) & allowed_T[:, None] & allowed_T
    sums_TT = np.where(spans_TT, starts_T[:, None] + ends_T, -np.inf)
    start, end = np.unravel_index(sums_TT.argmax(), sums_TT.shape)
    first, last = offsets[start], offsets[end]
    if first is None or last is None:  # a window of the question alone
        return -np.inf, ""
    return float(sums_TT[start, end]), context[first[0] : last[1]]


def answer_scores(answers: Sequence[str], gold: Sequence[Sequence[str]]) -> Scores:
    """Exact match and F1 of words, against the nearest of the right answers (Rajpurkar et al. 2016, section 6.1)."""
    exact, overlap = [], []
    for answer, right in zip(answers, gold, strict=True):
        given, wanted = normal_words(answer), [normal_words(text) for text in right or [""]]
        exact.append(max(given == words for words in wanted))
        overlap.append(max(_f1(given, words) for words in wanted))
    return {"exact_match": sum(exact) / len(exact), "f1": sum(overlap) / len(overlap)}


def normal_words(text: str) -> list[str]:
    """Lower case without punctuation and articles, as in SQuAD's script; an ideograph is a word, as in CMRC's."""
    kept = _PUNCTUATION.sub("", text.lower())
    return re.sub("([\u3400-\u9fff])", r" \1 ", re.sub(r"\b(a|an|the)\b", " ", kept)).split()


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted))
