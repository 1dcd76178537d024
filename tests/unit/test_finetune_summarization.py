"""Extractive summaries: the greedy oracle against its definition by rouge-score; a tiny model finds the sentences."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from cloze.errors import UserError
from finetune.__main__ import finetune
from finetune.families.summarization import Document, encoded, oracle, rouge
from tests.unit.tiny_bert import config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def test_oracle_adds_what_raises_rouge_most() -> None:
    rng = np.random.default_rng(1)
    scorer = RougeScorer(["rouge1", "rouge2"])
    for _ in range(20):
        sentences = tuple(" ".join(rng.choice(["red", "blue", "fox", "dog", "ran"], 4)) for _ in range(5))
        document = Document(sentences, " ".join(rng.choice(["red", "fox", "dog", "ran"], 6)))

        def value(chosen: list[int], document: Document = document) -> float:
            text = " ".join(document.sentences[i] for i in sorted(chosen))
            return sum(score.fmeasure for score in scorer.score(document.summary, text).values())

        steps: list[list[int]] = [[]]
        while len(steps) <= 3:
            best = max(([*steps[-1], i] for i in range(5) if i not in steps[-1]), key=lambda c: (value(c), -c[-1]))
            if value(best) <= value(steps[-1]) + 1e-12:
                break
            steps.append(best)
        assert oracle(document, 3) == sorted(steps[-1])
        assert all(value(b) > value(a) for a, b in pairwise(steps))


def test_each_sentence_has_a_cls_and_the_last_that_fits_ends_the_row(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    document = Document(("good film", "the bad", "a " * 5, "was"), "the bad")
    (feature,) = encoded([document], tokenizer, 12, 1)
    assert tokenizer.decode(feature["input_ids"]) == "[CLS] good film [SEP] [CLS] the bad [SEP]"
    assert feature["token_type_ids"] == [0] * 4 + [1] * 4
    assert feature["labels"] == [0, -100, -100, -100, 1, -100, -100, -100]
    (long,) = encoded([Document(("a " * 30,), "a")], tokenizer, 12, 1)
    assert len(long["input_ids"]) == 12


@pytest.mark.slow
def test_finds_the_sentences_of_the_summary(tmp_path: Path, model: Path) -> None:
    """The sentence with ann is the summary; the first one, which a lead takes, is not."""
    rng = np.random.default_rng(2)
    for name, count in (("train.jsonl", 120), ("dev.jsonl", 40)):
        rows = []
        for _ in range(count):
            sentences = [" ".join(rng.choice(["the", "film", "was", "bad"], 4)) for _ in range(5)]
            sentences[int(rng.integers(1, 5))] = "ann met bob"
            rows.append(json.dumps({"sentences": sentences, "summary": ["ann met bob ?"]}))
        (tmp_path / name).write_text("\n".join(rows))
    settings = ["task=summarization", "top_sentences=1", "epochs=4"]
    result = finetune(config(tmp_path, model, *settings, suffix="jsonl"))
    assert result["rougeL"] > 0.9 > 0.3 > result["lead_rougeL"]
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "summary": "b"}')
    with pytest.raises(
        UserError, match=r"dev\.jsonl: line 1: sentences \(a list\) and summary .* there are text, summ"
    ):
        finetune(config(tmp_path, model, *settings, f"out={tmp_path}/b", suffix="jsonl"))


def test_rouge_of_ideographs() -> None:
    assert rouge(["北京很大"], ["北京大"])["rouge1"] == pytest.approx(6 / 7)
