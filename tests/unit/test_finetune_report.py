"""The page of a fine-tuned model: its figures are those of its files, its text stays text, it needs no script."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cloze import cli
from cloze.errors import UserError
from finetune.config import FinetuneConfig, facts
from finetune.page import LOSSES, PREDICTIONS, write_page
from finetune.report import main
from tests.unit.test_report import EVIL, Page


def learned(folder: Path, name: str, score: float, *overrides: str, **more: Any) -> Path:
    """What `python -m finetune` leaves, but for the weights."""
    out = folder / name
    out.mkdir()
    given = ["task=classification", "model=bert", "data.train=a", "data.dev=d", "optim.lr=3e-3", f"out={out}"]
    settings = facts(cli.compose("finetune", FinetuneConfig, [*given, *overrides]))
    body: dict[str, Any] = {
        "accuracy": score, "by_seed": {"1": {"accuracy": score}, "2": {"accuracy": score - 0.1}}, "model_of_seed": 1,
        "score": "accuracy", "guessing": {"accuracy": 0.5}, "unk_share": {"train": 0.0, "dev": 0.1}, "config": settings,
        "train_examples": 1234, "dev_examples": 5, "labels": ["x", EVIL], "sha256": {"data.dev": "d"},
    }  # fmt: skip
    (out / "metrics.json").write_text(json.dumps(body | more))
    return out


ROWS = [
    {"sentence": "sure and wrong", "label": "x", "predicted": EVIL, "wrong": 0.97},
    {"sentence": EVIL, "label": EVIL, "predicted": "x", "wrong": 0.55},
    *({"sentence": f"right {n}", "label": "x", "predicted": "x", "wrong": 0.0} for n in range(3)),
]


def test_it_shows_what_is_taken_for_what_and_the_worst_first(tmp_path: Path) -> None:
    out = learned(tmp_path, "own", 0.8)
    (out / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in [ROWS[1], *ROWS[2:], ROWS[0]]))
    (out / LOSSES).write_text(json.dumps({"1": [[1, 0.7], [2, 0.5]], "2": [[1, 0.71], [2, 0.4]]}))
    text = write_page(out, out).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.references == []
    assert "script-src" not in text
    assert EVIL in page.text
    assert re.findall(r'<td style="[^"]*">(\d+)</td>', text) == ["3", "1", "1", "0"]
    assert page.text.index("sure and wrong") < page.text.index("97%") < page.text.index("55%")
    assert "right 1" not in page.text
    assert "2 of 5" in page.text
    for told in ("80.0", "guessing gives 50.0", "1,234", "better than guessing", "python -m finetune.predict"):
        assert told in page.text
    assert text.count('class="line train"') == 2
    assert "Settings that were tried" not in page.text
    assert len(text) < 100_000


def test_other_settings_and_random_weights_stand_beside(tmp_path: Path) -> None:
    out = learned(tmp_path, "own", 0.8)
    learned(tmp_path, "high", 0.9, "optim.lr=1e-2")
    learned(tmp_path, "random", 0.6, "init=random")
    learned(tmp_path, "another", 0.99, sha256={"data.dev": "e"})  # on other data
    text = write_page(out, out).read_text()
    told = Page(text).text
    assert "random weights" in told
    assert "mean 55.0 ± 5.0; pretraining gives +20.0" in told, "medians beside medians, not the best seed"
    assert "better than guessing and random weights" in told
    section = told.partition("Settings that were tried")[2]
    assert section.index("high") < section.index("own")
    assert "another" not in section
    assert re.search(r"accuracy by optim\.lr", text)


def test_what_lies_within_the_error_is_no_gain(tmp_path: Path) -> None:
    out = learned(tmp_path, "own", 0.8)
    learned(tmp_path, "random", 0.76, "init=random")
    assert "no better than random weights" in Page(write_page(out, out).read_text()).text


def test_a_model_that_learned_nothing_is_called_so(tmp_path: Path) -> None:
    out = learned(tmp_path, "own", 0.5, verdicts={"1": "answers 'x' to everything"})
    told = Page(write_page(out, out).read_text()).text
    assert "of little worth" in told
    assert "seed 1: the model answers 'x' to everything" in told
    assert "What it gets wrong" not in told, "nobody says"


def test_answers_of_other_families(tmp_path: Path) -> None:
    for name, row, words in (
        ("tags", {"words": ["Ann", "sat"], "tags": ["B-PER", "O"], "predicted": ["O", "O"], "wrong": 0.5}, "Ann B-PER"),
        ("qa", {"id": "1", "question": "who", "answers": [], "predicted": "Ann", "wrong": 1.0}, "no answer"),
        ("regression", {"sentence1": "a", "sentence2": "b", "label": 5.0, "predicted": 3.25, "wrong": 1.75}, "1.75"),
    ):
        out = learned(tmp_path, name, 0.8, labels=["O", "B-PER", "I-PER"] if name == "tags" else None)
        (out / PREDICTIONS).write_text(json.dumps(row) + "\n")
        told = Page(write_page(out, out).read_text()).text
        assert words in told
        assert ("What it takes for what" in told) == (name == "tags")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = learned(tmp_path, "own", 0.8)
    assert main([str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out / 'report.html'}\n"
    assert printed.err == f"{out / 'report.html'}: open it in a browser\n"
    (tmp_path / "mine.html").write_text("mine")
    assert main([str(out), "--out", str(tmp_path / "mine.html")]) == 64
    assert (tmp_path / "mine.html").read_text() == "mine"
    with pytest.raises(UserError, match="holds no model that `python -m finetune` wrote"):
        write_page(tmp_path, tmp_path)
