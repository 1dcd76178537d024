"""Files as users have them: what is read, what is left out and counted, what is refused."""

import json
from pathlib import Path

import pytest

from cloze import cli
from cloze.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data import both_sets
from finetune.families.classification import Example, examples
from finetune.families.qa import Question, questions
from finetune.families.tagging import Sentence, sentences


def settings(path: Path, *overrides: str) -> FinetuneConfig:
    return cli.compose(
        "finetune", FinetuneConfig, [f"data.train={path}", f"data.dev={path}", "model=m", "out=o", *overrides]
    )


def classified(path: Path, text: str, *overrides: str) -> list[Example]:
    path.write_text(text)
    config = settings(path, *overrides)
    return examples(both_sets(config)[0], config)


def tagged(path: Path, text: str, *overrides: str) -> list[Sentence]:
    path.write_text(text)
    config = settings(path, "task=ner", *overrides)
    return sentences(both_sets(config)[0], config.data)


def asked(path: Path, body: object, *, need_places: bool = True) -> list[Question]:
    path.write_text(json.dumps(body))
    return questions(both_sets(settings(path, "task=squad"))[0], need_places=need_places)


def test_an_empty_text_is_one_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QQP's own files have two empty questions."""
    text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\t\t0\n2\t3\t4\ta b\tc d\t1\n"
    found = classified(tmp_path / "qqp.tsv", text, "task=qqp")
    assert found == [Example("How?", "", "not_duplicate"), Example("a b", "c d", "duplicate")]
    assert "qqp.tsv: 1 of 2 examples have an empty text; they are used as they are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "bad", "good", "fault"),
    [
        ("a.tsv", "x\ty\tz", "good\t1", "line 2: 3 columns where the header has 2"),
        ("a.tsv", "x\t", "good\t1", 'line 2: label is ""; a text is needed there'),
        ("a.jsonl", '{"sentence"', '{"sentence": "good", "label": 1}', "line 2: not JSON"),
        (
            "a.jsonl",
            '{"text": "x"}',
            '{"sentence": "good", "label": 1}',
            "line 2: the columns sentence, label are needed",
        ),
    ],
)
def test_bad_rows_are_left_out_up_to_a_share(
    name: str, bad: str, good: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 4, two of 200 and four of 200; a file of nothing else is refused whatever the share."""
    header = ["sentence\tlabel"] if name == "a.tsv" else [good]

    def read(num_bad: int, num_good: int, *overrides: str) -> int:
        lines = [*header, *[bad] * num_bad, *[good] * num_good]
        return len(classified(tmp_path / name, "\n".join(lines), *overrides))

    more = len(header) - (name == "a.tsv")
    assert read(1, 3) == 3 + more
    assert f"a{Path(name).suffix}: 1 of {4 + more} rows were left out; {fault}" in capsys.readouterr().err
    assert read(2, 198) == 198 + more
    with pytest.raises(UserError, match=rf"{fault}.*; so are 2\.0% of the rows, data\.max_bad_fraction allows 1\.0%"):
        read(4, 196 - more)
    assert read(4, 196, "data.max_bad_fraction=0.05") == 196 + more
    if name == "a.tsv":
        with pytest.raises(UserError, match=fault):
            read(1, 0, "data.max_bad_fraction=0.5")


def test_tables_of_other_programs(tmp_path: Path) -> None:
    """Upper case, semicolons, blanks in the header, pandas' floats, a Mac's line ends, arrays of JSON."""
    expected = [Example("a, b", None, "1"), Example("c", None, "0")]
    assert classified(tmp_path / "TRAIN.CSV", 'sentence,label\n"a, b",1.0\nc,0.0\n') == expected
    assert classified(tmp_path / "a.csv", "sentence ; label \na, b;1\nc;0\n") == expected
    assert classified(tmp_path / "a.tsv", "sentence \tlabel \na, b\t1\nc\t0\n") == expected
    assert classified(tmp_path / "mac.tsv", "sentence\tlabel\ra, b\t1\rc\t0\r") == expected
    records = [{"sentence": "a, b", "label": 1.0}, {"sentence": "c", "label": 0}]
    assert classified(tmp_path / "a.json", json.dumps(records)) == expected
    assert classified(tmp_path / "b.json", json.dumps(records, indent=1)) == expected
    assert classified(tmp_path / "a.tsv", "sentence\tlabel\na, b\t1.0\nc\t0.0\n", "task=sst2")[0].label == "positive"
    scores = classified(tmp_path / "a.tsv", "sentence\tlabel\na\t1.0\n", "task=regression")
    assert [example.label for example in scores] == ["1.0"], "a number stays one"


def squad(context: str, *answers: tuple[str, int]) -> dict[str, object]:
    given = [{"text": text, "answer_start": start} for text, start in answers]
    qa = {"id": "1", "question": "q?", "answers": given, "is_impossible": False}
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}]}


def test_misplaced_answers_are_found_where_they_stand_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    assert asked(path, squad(" Pure Land is here", ("Pure Land", 1)))[0].start == 1
    assert "not stand" not in capsys.readouterr().err
    (found,) = asked(path, squad("\U0001f600 Paris is", ("Paris", 3)))  # counted in units of UTF-16
    assert (found.answers, found.start) == (("Paris",), 2)
    assert "a.json: 1 answers do not stand where answer_start says" in capsys.readouterr().err
    (found,) = asked(path, squad("a b a", ("a", 1), ("b", 2)))
    assert (found.answers, found.start) == (("b", "a"), 2), "the one that has a place is learned"


def test_questions_whose_answer_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They cannot be learned from; scores need the text alone."""
    body = squad("a b a", ("a", 1))
    body["data"] += squad("a b", ("b", 2))["data"]  # type: ignore[operator]
    (found,) = asked(tmp_path / "a.json", body)
    assert found.answers == ("b",)
    told = "1 of 2 rows were left out; question 1: the context does not have the answer 'a' at character 1, nor once"
    assert told in capsys.readouterr().err
    dev = asked(tmp_path / "a.json", body, need_places=False)
    assert [(question.answers, question.start) for question in dev] == [(("a",), None), (("b",), 2)]
    with pytest.raises(UserError, match="its answer is blank"):
        asked(tmp_path / "a.json", squad("a b", (" ", 1)))


def test_cmrc_s_own_layout(tmp_path: Path) -> None:
    qa = {"query_id": "1", "query_text": "q", "answers": ["\u4eac", "\u4eac", "\u5317\u4eac"]}
    body = [{"context_id": "T", "context_text": "\u5317\u4eac\u4eac", "qas": [qa], "title": "x"}]
    assert asked(tmp_path / "cmrc.json", body) == [
        Question("1", "q", "\u5317\u4eac\u4eac", ("\u4eac", "\u5317\u4eac"), 1)
    ]


GERMEVAL = "#\thttp://x [2009]\n1\tAnna\tB-PER\tO\n2\tlacht\tO\tO\n\n1\tRom\tB-LOC\tO\n"


def test_columns_of_conll(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    with pytest.raises(UserError, match=r"a\.tsv: the first column numbers the words; data\.columns=\[2,3\]"):
        tagged(path, GERMEVAL)
    expected = [Sentence(("Anna", "lacht"), ("B-PER", "O")), Sentence(("Rom",), ("B-LOC",))]
    assert tagged(path, GERMEVAL, "data.columns=[2,3]") == expected
    assert [one.tags for one in tagged(path, GERMEVAL, "data.columns=[2,4]")] == [("O", "O"), ("O",)]
    for wrong in ("[2,5]", "[word,tag]", "[2]"):
        with pytest.raises(UserError, match=r"two numbers from 1 to 4 are needed"):
            tagged(path, GERMEVAL, f"data.columns={wrong}")
    conll2003 = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"
    assert tagged(path, conll2003) == [Sentence(("EU", "rejects"), ("B-ORG", "O"))]


def test_comments_and_white_words_of_conll(tmp_path: Path) -> None:
    text = "# sent_id = 1\n# text = a # b\n\u3000\tO\na\tB-X\n \tI-X\n#\tO\n"
    assert tagged(tmp_path / "a.conll", text) == [Sentence(("\u3000", "a", " ", "#"), ("O", "B-X", "I-X", "O"))]
    assert tagged(tmp_path / "a.conll", "# sent_id = 1\na O\n# O\n") == [Sentence(("a", "#"), ("O", "O"))]
    assert tagged(tmp_path / "mac.conll", "a\tO\rb\tB-X\r\rc\tO\r")[0].words == ("a", "b")


def test_a_sentence_with_other_columns_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tagged(tmp_path / "a.conll", "a\tx\tO\nb\tx\tB-X\n\nc\tO\n\nd\tx\tO\n")
    assert [one.words for one in found] == [("a", "b"), ("d",)]
    assert "a.conll: 1 of 3 rows were left out; line 4: 2 columns where most lines have 3" in capsys.readouterr().err
