"""What a plain text is taken for, and that every task does the same."""

import logging
import random
import textwrap

import pytest

from cloze.cli import compose
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.stages.documents import Tally, pieces
from data_prep.text.layout import judged
from tests.unit.corpora import TEXT, documents, sentence

RNG = random.Random(5)
WORDS = TEXT.split()


def bare(count: int) -> list[str]:
    """Lines without marks and capitals."""
    return [" ".join(RNG.choices(WORDS, k=RNG.randint(4, 15))) for _ in range(count)]


def groups(count: int, size: int, line) -> list[str]:
    return [text for _ in range(count) for text in [*(line() for _ in range(size)), ""]]


TEXTS = documents(80)
LAYOUTS = {
    "sentences a line, bare": (groups(30, 7, lambda: bare(1)[0]), ("blank_line", "lines")),
    "sentences a line, with marks": (groups(30, 7, lambda: sentence(RNG)), ("blank_line", "lines")),
    "sentences a line in lower case": (groups(30, 7, lambda: sentence(RNG).lower()), ("blank_line", "lines")),
    "sentences a line, Thai": (groups(30, 5, lambda: "การเรียนรู้ของเครื่อง" * RNG.randint(1, 5)), ("blank_line", "lines")),
    "documents a line": (TEXTS, ("line", "rules")),
    "documents a line in lower case": ([text.lower() for text in TEXTS], ("line", "rules")),
    "documents a line, Hindi": (["वह घर गया। वह स्कूल गया। वह आया।"] * 50, ("line", "rules")),
    "one sentence a line, no blank lines": (bare(100), ("blank_line", "lines")),
    "a line a document between blank lines": ("\n\n".join(TEXTS).split("\n"), ("blank_line", "rules")),
    "wrapped": ("\n\n".join(textwrap.fill(text, 70) for text in TEXTS).split("\n"), ("blank_line", "rules")),
    "wrapped, bare": (textwrap.fill(" ".join(bare(300)), 72).split("\n"), ("blank_line", "rules")),
    "wrapped, Chinese": (textwrap.fill("我们在北京大学学习，你好吗？" * 80, 40).split("\n"), ("blank_line", "rules")),
    "paragraphs a line": (groups(30, 4, lambda: " ".join(sentence(RNG) for _ in range(5))), ("blank_line", "rules")),
    "few lines": (["a", "b", "", "c"], ("blank_line", "rules")),
    "nothing": ([], ("blank_line", "rules")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    lines, expected = LAYOUTS[name]
    found = judged([lines])
    assert (found.document, found.sentences) == expected, found.why
    assert "\n" not in found.why + found.advice


def test_short_documents_are_told_of():
    novel = judged([groups(60, 1, lambda: sentence(RNG))])
    assert "documents of 1.0 sentences" in novel.advice
    assert "source.document=file" in novel.advice
    assert "source.document=line" in judged([bare(100)]).advice
    assert not judged([TEXTS]).advice


def planned(tmp_path, *overrides):
    return make_plan(
        compose("prep", PrepConfig, ["source=text", f"source.paths=[{tmp_path}/*.txt]", "out=x", *overrides])
    )


def test_the_decision_stands_in_the_plan(tmp_path, caplog):
    lines = LAYOUTS["sentences a line, bare"][0]
    (tmp_path / "a.txt").write_text("\r".join(lines))
    with caplog.at_level(logging.INFO, "cloze"):
        plan = planned(tmp_path)
    assert "source.document=blank_line, sentences=lines" in caplog.text
    assert (plan.sources[0].document, plan.sentences) == ("blank_line", ("lines",))
    assert '"document":"blank_line"' in plan.identity()
    assert '"sentences":["lines"]' in plan.identity()
    assert planned(tmp_path).sha256() == plan.sha256()
    found = [piece.sentences for task in range(len(plan.tasks)) for piece in pieces(plan, task, Tally())]
    assert [line for group in found for line in group] == [line for line in lines if line]
    assert len(found) == 30


def test_what_is_asked_for_is_done(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[:9]))
    for document, count in (("line", 89), ("file", 2), ("blank_line", 2), ("auto", 89)):
        plan = planned(tmp_path, f"source.document={document}", "sentences=rules")
        assert plan.sentences == ("rules",)
        origins = {piece.origin for task in range(len(plan.tasks)) for piece in pieces(plan, task, Tally())}
        assert len(origins) == count


def test_one_huge_document_is_told_of(tmp_path, caplog):
    (tmp_path / "a.txt").write_text((TEXTS[0] + "\n") * (17 * 2**20 // len(TEXTS[0])))
    with caplog.at_level(logging.WARNING, "cloze"):
        planned(tmp_path, "source.document=file")
    assert "one document of" in caplog.text
    assert "100% of the source" in caplog.text
