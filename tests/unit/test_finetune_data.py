"""Files as users have them: what is read, what is left out and counted, what is refused."""

import json
from pathlib import Path

import datasets
import pytest

from cloze import cli
from cloze.errors import UserError
from finetune import suite
from finetune.config import FinetuneConfig, SuiteConfig
from finetune.data import both_sets, more_sets
from finetune.families import SUITES, classification, tagging
from finetune.families.classification import Example, examples
from finetune.families.qa import Question, questions
from finetune.families.tagging import Sentence, sentences
from tests.unit.tiny_bert import config as tiny_config
from tests.unit.tiny_bert import write_tiny_bert


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
    assert "answer_start" not in capsys.readouterr().err
    (found,) = asked(path, squad("\U0001f600 Paris is", ("Paris", 3)))  # counted in units of UTF-16
    assert (found.answers, found.start) == (("Paris",), 2)
    assert "answers that are not at their answer_start, but once elsewhere, found there: 1" in capsys.readouterr().err
    assert asked(path, squad("Pure Land is", (" Pure Land", 0)))[0].start == 0, "a blank before it counts for nothing"
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


def test_columns_of_a_table_without_a_header_are_numbered(tmp_path: Path) -> None:
    """As STS-B's published copies have it. A header that is there after all is not an example."""
    text = "a film,x\nb film,y\nc film,x\nd film,y\n"
    expected = [Example("a film", None, "x"), Example("b film", None, "y")]
    assert classified(tmp_path / "a.csv", text, "data.columns=[1,2]")[:2] == expected
    scores = classified(tmp_path / "a.csv", "a,b,5.0\nc,d,0.5\n", "task=stsb", "data.columns=[1,2,3]")
    assert scores == [Example("a", "b", "5.0"), Example("c", "d", "0.5")]
    with pytest.raises(UserError, match=r"a\.csv: line 2: the columns .* there are a film, x; .* by number: \[1,2\]\)"):
        classified(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match=r"line 1: label 'label' stands nowhere else; if that line is a header, name"):
        classified(tmp_path / "a.csv", f"sentence,label\n{text}", "data.columns=[1,2]")
    with pytest.raises(UserError, match=r"line 1: task=stsb: label 'score': must be a number from 0 to 5"):
        classified(tmp_path / "a.csv", "s,t,score\na,b,5.0\n", "task=stsb", "data.columns=[1,2,3]")
    with pytest.raises(UserError, match=r"the columns 1, 4 are needed, there are 1, 2"):
        classified(tmp_path / "a.csv", text, "data.columns=[1,4]")


def test_numbers_are_named_by_data_labels(tmp_path: Path) -> None:
    text = "sentence\tlabel\na\t0\nb\t1.0\nc\tgood\n"
    found = classified(tmp_path / "a.tsv", text, "data.labels=[bad,good]")
    assert [example.label for example in found] == ["bad", "good", "good"]
    with pytest.raises(UserError, match=r"line 2: label '2': data\.labels has bad, good, or 0 to 1"):
        classified(tmp_path / "a.tsv", "sentence\tlabel\na\t2\n", "data.labels=[bad,good]")


@pytest.mark.parametrize(("codec", "name"), [("gb18030", "gb18030"), ("utf-16", None), ("utf-8-sig", None)])
def test_encodings(codec: str, name: str | None, tmp_path: Path) -> None:
    """UTF-16 and UTF-8 are told by their marks; others by data.encoding, which the refusal names."""
    pairs = [("这部电影非常好看", "好"), ("服务态度很差, 不会再来", "差"), ("房间干净整洁", "好")] * 5
    text = "sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in pairs)
    (tmp_path / "a.tsv").write_bytes(text.encode(codec))
    path, own = tmp_path / "a.tsv", [f"data.encoding={name}"] if name else []
    if name:
        with pytest.raises(UserError, match=r"a\.tsv: line 2: is not UTF-8; set data\.encoding=gb\w+, which it looks"):
            both_sets(settings(path))
        with pytest.raises(UserError, match=r"data\.encoding=utf-9: no such encoding; utf-8, gb18030"):
            settings(path, "data.encoding=utf-9")
    config = settings(path, *own)
    assert examples(both_sets(config)[0], config) == [Example(one, None, label) for one, label in pairs]


def test_named_entities_in_json(tmp_path: Path) -> None:
    """Words and tags under the names that data sets have for them, tags by name or by number."""
    expected = [Sentence(("Ann", "met"), ("B-PER", "O")), Sentence(("Rome",), ("B-LOC",))]
    for words, tags in (("tokens", "ner_tags"), ("words", "tags"), ("tokens", "labels")):
        rows = [{words: [*one.words], tags: [*one.tags], "id": "0"} for one in expected]
        assert tagged(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))) == expected
        assert tagged(tmp_path / "a.json", json.dumps(rows)) == expected
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    rows = [{"tokens": [*one.words], "ner_tags": [names.index(tag) for tag in one.tags]} for one in expected]
    text = "\n".join(map(json.dumps, rows))
    assert tagged(tmp_path / "a.jsonl", text, f"data.labels=[{','.join(names)}]") == expected
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: ner_tags has numbers; data\.labels=\[O,B-PER,…\] tells th"):
        tagged(tmp_path / "a.jsonl", text)
    with pytest.raises(UserError, match=r"label '3': data\.labels has O, B-PER, or 0 to 1"):
        tagged(tmp_path / "a.jsonl", text.splitlines()[1], "data.labels=[O,B-PER]")
    own = text.replace("tokens", "mots").replace("ner_tags", "balises")
    with pytest.raises(
        UserError, match=r"line 1: lists of words .* are needed, there are mots, balises; data\.columns"
    ):
        tagged(tmp_path / "a.jsonl", own)
    of_own = ("data.columns=[mots,balises]", f"data.labels=[{','.join(names)}]")
    assert tagged(tmp_path / "a.jsonl", own, *of_own) == expected
    bad = '{"tokens": ["a", "b"], "ner_tags": ["O"]}\n{"tokens": "a b", "ner_tags": ["O"]}'
    with pytest.raises(UserError, match=r"line 1: 2 words and 1 tags; so are 100\.0% of the rows"):
        tagged(tmp_path / "a.jsonl", bad)


def test_named_entities_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of numbered tags comes back under their names."""
    kind = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(kind)})
    data = datasets.Dataset.from_dict({"tokens": [["Ann", "met"]], "ner_tags": [[1, 0]]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    config = settings(Path("hub:x:train"), "task=ner")
    assert sentences(both_sets(config)[0], config.data) == [Sentence(("Ann", "met"), ("B-PER", "O"))]


MNLI_PARSES = [f"sentence{side}_{kind}" for kind in ("binary_parse", "parse") for side in (1, 2)]
MNLI = ["index", "promptID", "pairID", "genre", *MNLI_PARSES, "sentence1", "sentence2", "label1"]
GLUE = {  # as GLUE's archives have them: folder, files, header (none: CoLA), a row, what is read
    "cola": ("CoLA", ("train", "dev"), None, ["gj04", "0", "*", "Him left."], ("Him left.", None, "unacceptable")),
    "sst2": ("SST-2", ("train", "dev"), ["sentence", "label"], ["a ' film", "1"], ("a ' film", None, "positive")),
    "mrpc": (
        "MRPC", ("train", "dev"), ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "12", "13", 'He said "no".', "b"], ('He said "no".', "b", "equivalent"),
    ),
    "stsb": (
        "STS-B", ("train", "dev"),
        ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
        ["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none", "a", "b", "5.000"], ("a", "b", "5.000"),
    ),
    "qqp": (
        "QQP", ("train", "dev"), ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["0", "1", "2", "a", "b", "0"], ("a", "b", "not_duplicate"),
    ),
    "mnli": (
        "MNLI", ("train", "dev_matched", "dev_mismatched"), [*MNLI, "gold_label"],
        ["0", "1", "1n", "fiction", "( a )", "( b )", "(ROOT a)", "(ROOT b)", "a", "b", "neutral", "neutral"],
        ("a", "b", "neutral"),
    ),
    "qnli": (
        "QNLI", ("train", "dev"), ["index", "question", "sentence", "label"],
        ["0", "a", "b", "not_entailment"], ("a", "b", "not_entailment"),
    ),
    "rte": (
        "RTE", ("train", "dev"), ["index", "sentence1", "sentence2", "label"],
        ["0", "a", "b", "entailment"], ("a", "b", "entailment"),
    ),
    "wnli": (
        "WNLI", ("train", "dev"), ["index", "sentence1", "sentence2", "label"],
        ["0", "a", "b", "1"], ("a", "b", "entailment"),
    ),
}  # fmt: skip


def test_glue_s_nine_tasks_in_glue_s_own_files(tmp_path: Path) -> None:
    """Under GLUE's own names of folders and files, the unlabelled test file beside them."""
    for folder, names, header, row, _ in GLUE.values():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.tsv").write_text("index\tsentence\n0\tx\n")
        for name in names:
            (tmp_path / folder / f"{name}.tsv").write_text(
                "".join("\t".join(one) + "\n" for one in (header, row) if one)
            )
    config = cli.compose("suite", SuiteConfig, ["suite=glue", "model=m", "out=o", f"data={tmp_path}"])
    assert {*GLUE} == {*SUITES["glue"]}
    for task, (_, names, _, _, expected) in GLUE.items():
        own = suite._settings(config, task)
        assert own is not None, task
        sets = [*both_sets(own), *more_sets(own).values()]
        assert len(sets) == len(names)
        assert [examples(one, own) for one in sets] == [[Example(*expected)]] * len(sets)


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_bert(tmp_path / "model", layers=1)
    long = " ".join(["film"] * 30)
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\n{long}\tx\nfilm\ty\n{' '.join(['film'] * 14)}\ty\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfilm\tx\nfilm\ty\n")
    classification.prepare(tiny_config(tmp_path, model, "max_len=16"))
    told = capsys.readouterr().err
    assert "train.tsv: 1 of 3 examples are longer than max_len=16 and are cut" in told
    assert "dev.tsv" not in told
    for name in ("train", "dev"):
        (tmp_path / f"{name}.conll").write_text("film O\nann B-P\n" * 15)
    tagging.prepare(tiny_config(tmp_path, model, "max_len=16", "task=ner", suffix="conll"))
    assert "train.conll: 1 of 1 examples are longer than max_len=16 and are cut" in capsys.readouterr().err
