"""Sentences and cleaning."""

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.cli import compose
from cloze.errors import UserError
from data_prep.config import PrepConfig
from data_prep.plan import make_plan
from data_prep.stages.documents import Tally, pieces
from data_prep.text.cleaning import filters_for, judge, repair
from data_prep.text.sentences import MAX_CHARACTERS, cut_by, split_sentences
from tests.unit.corpora import FUZZ, write_jsonl

CASES = [
    ["Mr. Smith met J. R. R. Tolkien on No. 5 St. James St. at 3.14 p.m. sharp.", "He left."],
    ['"Really?" she said.', '"Yes!"', "He ran... and ran.", '"No."'],
    ["He was e.g. Dutch, i.e. not Belgian (cf. Fig. 3).", "(Yes.)", "Was he?!", "He was."],
    ["Wait…", "What?", "It cost $3.50.", "See www.example.com for more."],
    ["\u4f60\u597d\u3002", "\u6211\u5f88\u597d\uff01", "\u300c\u771f\u7684\uff1f\u300d", "\u4ed6\u8bf4\u3002", "End."],
    ["\u0418\u0432\u0430\u043d \u043f\u0440\u0438\u0448\u0451\u043b.", "\u041e\u043d \u0443\u0448\u0451\u043b."],
    ["No stop at all"],
    ["Ah . . . she left . . .", "He ran."],
    ["मैं घर जा रहा हूँ।", "आज मौसम अच्छा है॥", "क्या?", "हाँ।"],
    ["هل أنت هنا؟", "نعم.", "وہ گیا۔", "ठीक।"],
    ["Ես այստեղ եմ։", "Դու գնացիր:", "Լավ։"],
    ["Πού είσαι;", "Εδώ."],
    ["ሰላም ነው።", "ደህና፧", "እሺ፨"],
    ["བཀྲ་ཤིས། །", "བདེ་ལེགས།"],
    ["ខ្ញុំទៅ។", "ល្អ៕"],
    ["我买了３．１４斤．", "他说：“好。”", "走吧！！"],
    ["\U00011103\U00011104\U00011141", "\U00011103."],
    ["Really\u203c", "Yes\u2049", "So."],
    ["a cat sat.", "it was old!", "was it?", "mr. smith, no. 5, knew."],
    ['"He is duller than I."', "She was sure.", "\u201cDr. No, by J. B.\u201d", "It was."],
]


@pytest.mark.parametrize("sentences", CASES)
def test_sentence_ends(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize("mark", "।॥۔؟።։。．｡！？᙮᠃᠉།។")
def test_a_mark_that_only_ends_sentences_needs_no_space(mark):
    first, last = f"अ{mark}", f"ब{mark}"
    assert split_sentences(first + last) == split_sentences(f"{first} {last}") == [first, last]
    assert split_sentences(f"अ{mark}{mark}") == [f"अ{mark}{mark}"]


@pytest.mark.slow
def test_every_mark_of_unicode_ends_a_sentence():
    regex = pytest.importorskip("regex")
    marks = [chr(c) for c in range(0x110000) if regex.match(r"\p{Sentence_Terminal}", chr(c))]
    assert len(marks) > 150
    missed = [mark for mark in marks if mark != "\u2024" and len(split_sentences(f"Ab{mark} Cd")) != 2]
    assert not [mark for mark in missed if unicodedata.category(mark) != "Cn"]  # newer than the table


def test_lines_can_be_sentences():
    text = " one line\ntwo.  Words here.\n\n\nthe end" + " x" * MAX_CHARACTERS
    sentences = split_sentences(text, cut_by("lines", "en"))
    assert sentences[:2] == ["one line", "two. Words here."]
    assert all(len(sentence) <= MAX_CHARACTERS for sentence in sentences[2:])
    assert "".join("".join(sentences).split()) == "".join(text.split())


def test_empty_lines_end_sentences_and_white_space_is_made_even():
    assert split_sentences("  a title\n \t\n\nwrapped\r\nline.  Two\tspaces.\xa0Here ") == [
        "a title",
        "wrapped line.",
        "Two spaces.",
        "Here",
    ]


@given(st.text(alphabet="aB1 .!?…\n\t\"'\u3002\u201d)", max_size=400))
def test_nothing_but_white_space_is_lost(text):
    nothing_is_lost(text)


@given(st.text(max_size=200), st.text(alphabet='Aa. \u3002"!?\u2026)1\n', max_size=6), st.integers(1, 3000))
@settings(max_examples=100 * FUZZ, deadline=None)
def test_any_text_is_cut_soon(text, unit, repeated):
    started = time.process_time()
    nothing_is_lost(text + unit * repeated + text)
    assert time.process_time() - started < 2


def nothing_is_lost(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in sentences)


@given(st.text(alphabet="aB1 .!?…|\u266c\u0238\n\t\"'\u3002\u201d)", max_size=60))
def test_pysbd_loses_nothing_either(text):
    """By itself it does, of texts such as "He said. y\u3000there.": those are cut by our rules."""
    sentences = split_sentences(text, cut_by("pysbd", "en"))
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in sentences)


def test_pysbd_cuts_by_the_rules_of_its_language():
    text = "Er kam am 3. Mai an. \u201eGut.\u201c Bzw. Herr Dr. Klein."
    assert split_sentences(text, cut_by("pysbd", "de"))[0] == "Er kam am 3. Mai an."
    assert split_sentences(text, cut_by("pysbd", "en"))[0] != "Er kam am 3. Mai an."
    for language in ("xx", ""):
        with pytest.raises(UserError, match=rf"^language={language}: pysbd has no rules"):
            cut_by("pysbd", language)


def test_preparation_takes_the_rules_it_is_told(tmp_path):
    text = 'The boy said "Stop it. Go home." He left.'
    write_jsonl(tmp_path / "a.jsonl", [text])
    found = {}
    for rules in ("rules", "pysbd"):
        overrides = ["source=jsonl", f"source.paths=[{tmp_path}/a.jsonl]", "out=x", f"sentences={rules}"]
        plan = make_plan(compose("prep", PrepConfig, overrides))
        found[rules] = [piece.sentences for piece in pieces(plan, 0, Tally())]
    assert found["rules"] == [['The boy said "Stop it.', 'Go home."', "He left."]]
    assert found["pysbd"] == [['The boy said "Stop it. Go home."', "He left."]]


@pytest.mark.parametrize("unit", ["-", ".", " ", "\n", " \n", "\n a", ". ", "a. ", '."', "\u3002", "A.", "no. ", "x"])
def test_no_text_costs_its_square(unit):
    text = unit * (300_000 // len(unit))
    started = time.process_time()
    sentences = split_sentences(text)
    assert time.process_time() - started < 2
    assert all(0 < len(sentence) <= MAX_CHARACTERS for sentence in sentences)


def test_repairs_are_named():
    assert repair("plain\n") == ("plain\n", ())
    assert repair("a\r\nb\rc") == ("a\nb\nc", ())
    assert repair("a\0b") == ("ab", ("nul_characters",))
    assert repair("x\ud800y") == ("x\ufffdy", ("lone_surrogates",))
    assert repair("\ud83d\ude00") == ("\U0001f600", ("lone_surrogates",))
    assert repair("\ufeffbom") == ("bom", ())


@given(st.text(max_size=100))
def test_repaired_text_can_be_encoded(text):
    assert "\0" not in repair(text)[0]
    repair(text)[0].encode()


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("", (False, "empty")), (" \n\u3000", (False, "empty")), ("abcd", (False, "too_short")), ("abcde", True)],
)
def test_filters_give_a_reason(text, verdict):
    assert judge(text, filters_for(5)) == verdict
