"""What a plain text is taken for, and that every task does the same."""

import json
import logging
import random
import shlex
import subprocess
import textwrap

import pytest

from cloze.cli import compose
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.stages.documents import Tally, pieces
from data_prep.text.layout import judged, marked_up
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
    "wrapped, paragraphs indented, no blank lines": (
        "\n".join(textwrap.fill(text, 72, initial_indent="    ") for text in TEXTS).split("\n"),
        ("blank_line", "rules"),
    ),
    "ragged, no blank lines": (
        [line for text in TEXTS for line in textwrap.wrap(text, RNG.randint(30, 90))],
        ("blank_line", "rules"),
    ),
    "wrapped, Korean": (
        "\n\n".join(
            textwrap.fill("\uac00\ub098\ub2e4 \ub77c\ub9c8 \ubc14\uc0ac\uc544\uc790 \ucc28. " * 20, 40)
            for _ in range(20)
        ).split("\n"),
        ("blank_line", "rules"),
    ),
    "sentences a line, --- between documents": (
        [line or "---" for line in groups(30, 7, lambda: bare(1)[0])],
        ("blank_line", "lines"),
    ),
    "a chat in which somebody says nothing": (
        [line or "..." for line in groups(30, 7, lambda: bare(1)[0])],
        ("blank_line", "lines"),
    ),
    "few lines": (["a", "b", "", "c"], ("blank_line", "rules")),
    "nothing": ([], ("blank_line", "rules")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    lines, expected = LAYOUTS[name]
    found = judged([lines])
    assert (found.document, found.sentences) == expected, found.why
    assert "\n" not in found.why + found.advice
    assert found.separator == ("---" if "---" in name else None)


def test_short_documents_are_told_of():
    novel = judged([groups(60, 1, lambda: sentence(RNG))])
    assert "documents of 1.0 sentences" in novel.advice
    assert "source.document=file" in novel.advice
    assert "source.document=line" in judged([bare(100)]).advice
    assert not judged([TEXTS]).advice


def test_wrapped_is_told_of_korean_and_of_indented_paragraphs():
    for name in ("wrapped, paragraphs indented, no blank lines", "wrapped, Korean"):
        assert "wrapped at" in judged([LAYOUTS[name][0]]).why


@pytest.mark.parametrize("separator", ["---", "* * *", "=" * 70, "<|endoftext|>", "</doc>", "%", "[SEP]", "#####"])
def test_lines_between_documents(tmp_path, separator, caplog):
    """Alone they are seen by themselves; beside blank lines, which may part paragraphs only, they are asked for."""
    texts = [" ".join(sentence(RNG) for _ in range(5)) for _ in range(40)]
    (tmp_path / "a.txt").write_text(f"\n{separator}\n".join(texts))
    plan = planned(tmp_path)
    found = [piece.sentences for task in range(len(plan.tasks)) for piece in pieces(plan, task, Tally())]
    assert [" ".join(group) for group in found] == texts
    (tmp_path / "a.txt").write_text(f"\n\n{separator}\n\n".join(f"{text}\n\n{text}" for text in texts))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cloze"):
        assert planned(tmp_path).sources[0].separator is None
    override = shlex.split(caplog.text.partition("blank lines do not, set ")[2])[0].removesuffix(";")
    plan = planned(tmp_path, f"source.separator='{separator}'")
    assert override == f"source.separator={separator}"
    found = [piece.sentences for task in range(len(plan.tasks)) for piece in pieces(plan, task, Tally())]
    assert [" ".join(group) for group in found] == [f"{text} {text}" for text in texts]


def test_without_a_separator_plans_are_those_of_before(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    assert '"separator":' not in planned(tmp_path).identity()
    assert '"separator":"#"' in planned(tmp_path, "source.separator='#'").identity()
    for given in (["source.separator=' '"], ["source.separator=x", "source.document=line"]):
        with pytest.raises(UserError, match="separator"):
            planned(tmp_path, *given)


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", " \u2003\t", "\u200b", "\x85"])
def test_a_line_of_any_white_space_is_blank(tmp_path, space):
    (tmp_path / "a.txt").write_text(f"\n{space}\n".join(TEXTS))
    plan = planned(tmp_path)
    found = [piece for task in range(len(plan.tasks)) for piece in pieces(plan, task, Tally())]
    assert len(found) == len(TEXTS)


@pytest.mark.parametrize("mark", ["\f", "\v", "\x85", "\u2028", "\u2029", "<|endoftext|>", "</s>"])
def test_ends_of_documents_within_lines_are_told_of_with_what_mends_them(tmp_path, mark):
    text = mark.join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    advice = judged([[text]]).advice
    assert "within lines" in advice
    command = advice.partition(": sed ")[2].removesuffix(" OLD > NEW")
    done = subprocess.run(f"sed {command} {tmp_path}/a.txt", shell=True, capture_output=True, check=True)
    assert done.stdout.decode() == "\n\n".join(TEXTS)


def test_what_is_no_plain_text_is_told_of():
    rows = [f"{n}\t{text}" for n, text in enumerate(TEXTS)]
    for lines, word in (
        ([json.dumps({"text": text}) for text in TEXTS], "source=jsonl"),
        (json.dumps([{"text": text} for text in TEXTS], indent=1).split("\n"), "source=jsonl"),
        ([f"<p>{text}</p>" for text in TEXTS], "trafilatura"),
        (rows, "read_csv"),
        (["id,text", *(f'{n},"{text}"' for n, text in enumerate(TEXTS))], "read_csv"),
    ):
        assert word in marked_up([lines])
    for lines, _ in LAYOUTS.values():
        assert marked_up([lines]) == ""
    assert marked_up([["<ann> hello", "<bob> hi"] * 9]) == ""


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
