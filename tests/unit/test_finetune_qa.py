"""Answers as spans: windows of long contexts, the best span against all of them, SQuAD's scores by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cloze.errors import UserError
from finetune.__main__ import finetune
from finetune.families.qa import Question, answer_scores, best_span, windows
from tests.unit.tiny_bert import config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def squad(rows: list[tuple[str, str, str | None]]) -> str:
    """SQuAD's nested form of (question, context, answer or None)."""
    paragraphs = []
    for number, (question, context, answer) in enumerate(rows):
        answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
        qa = {"id": str(number), "question": question, "answers": answers, "is_impossible": answer is None}
        paragraphs.append({"context": context, "qas": [qa]})
    return json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})


def some(count: int, seed: int) -> list[tuple[str, str, str | None]]:
    """Who is met stands after "met"; contexts of up to 80 words in a model of 64 positions; some meet nobody."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, str | None]] = []
    for number in range(count):
        words = [str(word) for word in rng.choice(["the", "film", "was", "good"], 78 if number % 8 == 0 else 8)]
        name = str(rng.choice(["ann", "bob", "rome"]))
        at = int(rng.integers(0, len(words)))
        if number % 5 == 1:
            rows.append(("who met?", " ".join(words), None))
        else:
            rows.append(("who met?", " ".join([*words[:at], "met", name, *words[at:]]), name))
    return rows


@pytest.mark.slow
def test_learns_to_answer_and_to_say_that_there_is_no_answer(tmp_path: Path, model: Path) -> None:
    (tmp_path / "train.json").write_text(squad(some(200, 1)))
    (tmp_path / "dev.json").write_text(squad(some(48, 2)))
    settings = config(tmp_path, model, "task=squad", "epochs=6", "stride=16", suffix="json")
    result = finetune(settings)
    assert result["f1"] > 0.8
    assert result["exact_match"] > 0.7
    body = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert body["dev_windows"] > body["dev_examples"] == 48


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 64), st.integers(2, 16))
def test_windows_hold_every_answer_and_every_word(
    tmp_path_factory: pytest.TempPathFactory, seed: int, max_len: int, stride: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "windows"
    tokenizer = AutoTokenizer.from_pretrained(folder if folder.exists() else write_tiny_bert(folder))
    rows = [(q, c, a) for q, c, a in some(6, seed) if a]
    dataset = [Question(str(i), q, c, (a,), c.index(a)) for i, (q, c, a) in enumerate(rows)]
    features, owners, offsets = windows(dataset, tokenizer, max_len, stride)
    covered: list[set[int]] = [set() for _ in dataset]
    answered = set()
    for feature, owner, own in zip(features, owners, offsets, strict=True):
        assert len(feature["input_ids"]) <= max_len
        covered[owner] |= {span[0] for span in own if span}
        first, last = own[feature["start_positions"]], own[feature["end_positions"]]
        if first and last:
            assert dataset[owner].context[first[0] : last[1]] == dataset[owner].answers[0]
            answered.add(owner)
        else:
            assert (feature["start_positions"], feature["end_positions"]) == (0, 0)
            assert not any(span and span[0] == dataset[owner].start for span in own)
    assert answered == set(range(len(dataset)))
    for question, starts in zip(dataset, covered, strict=True):
        assert {i for i in range(len(question.context)) if i == 0 or question.context[i - 1] == " "} <= starts


@given(st.integers(0, 10**6), st.integers(1, 45))
def test_best_span_against_all_spans(seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    starts, ends = rng.normal(size=(2, length)).astype(np.float32)
    context = "ab " * length
    offsets = [(3 * i, 3 * i + 2) if rng.random() < 0.8 else None for i in range(length)]
    every = [
        (starts[i] + ends[j], context[offsets[i][0] : offsets[j][1]])
        for i in range(length)
        for j in range(i, min(length, i + 30))
        if offsets[i] and offsets[j]
    ]
    value, text = best_span(starts, ends, offsets, context)
    assert (value, text) == pytest.approx(max(every, default=(-np.inf, "")))


def test_an_answer_has_thirty_tokens_at_most() -> None:
    starts, ends = np.zeros((2, 40), np.float32)
    starts[0], ends[29], ends[30] = 9, 5, 9
    value, text = best_span(starts, ends, [(3 * i, 3 * i + 2) for i in range(40)], "ab " * 40)
    assert (value, text) == (14, ("ab " * 30).strip())


def test_scores_by_hand() -> None:
    found = answer_scores(
        ["The cat, sat", "a dog", "", "in Rome", "北京大学"],
        [["cat sat", "x"], ["dog ran"], [], ["Rome"], ["大学"]],
    )
    assert found["exact_match"] == 2 / 5
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 1 + 2 / 3 + 4 / 6) / 5)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"question": "q", "context": "some film", "answers": [{"text": "good", "answer_start": 5}]},
            r"line 1: the con",
        ),
        (
            {"question": "q", "context": "film film", "answers": {"text": ["film"], "answer_start": [-4]}},
            r"does not have",
        ),
        ({"question": "q", "context": "film", "answers": {"text": ["film"]}}, r"answers need text and answer_start"),
        ({"query": "q", "context": "film"}, r"line 1: no question and no answers; there are query, context"),
        ({"question": "q", "context": 5, "answers": []}, r"line 1: context is 5; a text is needed there"),
        ({"question": 1, "context": "film", "answers": []}, r"line 1: question is 1; a text is needed there"),
        ({"question": "film " * 70, "context": "film", "answers": []}, r"max_len=64: a question has 70 tokens"),
    ],
)
def test_faulty_questions_are_named(row: dict[str, object], fault: str, tmp_path: Path, model: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=fault):
        finetune(config(tmp_path, model, "task=squad", suffix="jsonl"))
    (tmp_path / "train.jsonl").write_text('{"data": [{"paragraphs": [{"qas": [{}]}]}]}')
    with pytest.raises(UserError, match=r"train\.jsonl: not SQuAD's format \('context'\)"):
        finetune(config(tmp_path, model, "task=squad", suffix="jsonl"))
