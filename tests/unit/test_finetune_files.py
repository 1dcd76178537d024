"""Other members of each kind of file that users fine-tune on: what is read, and the one line where nothing can be."""

import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cloze import cli
from cloze.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data import both_sets
from finetune.families import classification, embedding, qa
from finetune.families.classification import Example, examples
from finetune.families.qa import Question
from finetune.families.summarization import documents
from finetune.families.tagging import Sentence, _with_siblings, sentences
from finetune.prediction import reading
from tests.unit.tiny_bert import config as tiny_config
from tests.unit.tiny_bert import write_tiny_bert

GOOD, BAD = Example("a good film", None, "1"), Example("a bad film", None, "0")
TSV = "sentence\tlabel\na good film\t1\na bad film\t0\n"
OBJECTS = [{"sentence": "a good film", "label": 1}, {"sentence": "a bad film", "label": 0}]


def settings(path: Path, *own: str) -> FinetuneConfig:
    return cli.compose("finetune", FinetuneConfig, [f"data.train={path}", f"data.dev={path}", "model=m", "out=o", *own])


def read(path: Path, data: str | bytes, *own: str) -> list[Example]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    config = settings(path, *own)
    return examples(both_sets(config)[0], config)


def tagged(path: Path, text: str | bytes, *own: str) -> list[Sentence]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    config = settings(path, "task=ner", *own)
    return sentences(both_sets(config)[0], config.data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("crlf.tsv", "\ufeff" + TSV.replace("\n", "\r\n")),
        ("tail.tsv", TSV.replace("\n", "\t\n").replace("label\t", "label")),  # a spreadsheet's empty cells
        ("a.csv", TSV.replace("\t", "|")),
        ("comma.tsv", TSV.replace("\t", ",")),
        ("semicolon.txt", TSV.replace("\t", ";")),
        ("blanks.csv", "sentence,label\na good film, 1\na bad film,0 \n"),
        ("a.tsv.xz", lzma.compress(TSV.encode())),
        ("frames.tsv.zst", zstandard.compress(TSV[:20].encode()) + zstandard.compress(TSV[20:].encode())),
        ("a.ndjson", "\n".join(map(json.dumps, OBJECTS))),
        ("data.json", json.dumps({"version": "1.0", "data": OBJECTS})),
        ("indented.json", json.dumps({"version": "1.0", "data": OBJECTS}, indent=1)),
        ("objects.json", "\n".join(json.dumps(one, indent=1) for one in OBJECTS)),
        ("side.jsonl", "".join(map(json.dumps, OBJECTS))),
        ("marks.jsonl", "\ufeff" + "\n\ufeff".join(map(json.dumps, OBJECTS))),
    ],
)
def test_tables_and_json_as_programs_write_them(name: str, data: str | bytes, tmp_path: Path) -> None:
    assert read(tmp_path / name, data) == [GOOD, BAD]


def test_a_zip_of_one_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.tsv.zip", "w") as archive:
        archive.writestr("train.tsv", TSV)
    assert read(tmp_path / "a.tsv.zip", (tmp_path / "a.tsv.zip").read_bytes()) == [GOOD, BAD]
    with zipfile.ZipFile(tmp_path / "a.tsv.zip", "a") as archive:
        archive.writestr("dev.tsv", TSV)
    with pytest.raises(UserError, match=r"a\.tsv\.zip: holds 2 files; unpack it and name one of them"):
        both_sets(settings(tmp_path / "a.tsv.zip"))


def test_parquet(tmp_path: Path) -> None:
    """Bytes are texts, a null is an empty one, structs have dotted names; `datasets` writes the labels' names along."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"sentence": [b"a good film", None], "label": [1.0, 0.0], "m": [{"t": "x"}, {"t": "y"}]})
    pyarrow.parquet.write_table(table, path)
    assert read(path, path.read_bytes()) == [GOOD, Example("", None, "0")]
    assert read(path, path.read_bytes(), "data.columns=[m.t,label]")[0] == Example("x", None, "1")
    names = datasets.ClassLabel(names=["neg", "pos"])
    kinds = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=kinds).to_parquet(str(path))
    assert [one.label for one in read(path, path.read_bytes())] == ["pos", "neg"]
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    kinds = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    datasets.Dataset.from_dict({"tokens": [["Ann", "met"]], "ner_tags": [[1, 0]]}, features=kinds).to_parquet(str(path))
    assert tagged(path, path.read_bytes()) == [Sentence(("Ann", "met"), ("B-PER", "O"))]
    with pytest.raises(UserError, match=r"a\.parquet: no sound Parquet file \(.*\); write it again"):
        read(path, path.read_bytes()[:300])


def test_values_within_objects(tmp_path: Path) -> None:
    text = json.dumps({"data": {"text": "a good film"}, "meta": {"label": 1}, "a.b": 0})
    assert read(tmp_path / "a.jsonl", text, "data.columns=[data.text,meta.label]") == [GOOD]
    with pytest.raises(UserError, match=r"the columns data\.txt, meta\.label are needed, there are data, meta, a\.b"):
        read(tmp_path / "a.jsonl", text, "data.columns=[data.txt,meta.label]")


def test_what_json_has_beyond_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is a gap, half a surrogate pair no character."""
    text = '{"sentence": NaN, "label": 1}\n{"sentence": "a \\ud83d", "label": 0}\n{"sentence": "b", "label": NaN}'
    assert read(tmp_path / "a.jsonl", text) == [Example("", None, "1"), Example("a ?", None, "0")]
    told = capsys.readouterr().err
    assert "1 of 3 rows were left out; line 3: label is null; a text is needed there" in told
    assert "1 of 2 examples have an empty text" in told


@pytest.mark.parametrize(
    ("rows", "kept", "fault"),
    [
        (["a good film,1", '"a good film,1', *["a good film,1"] * 9], 10, "line 3: 1 columns where the header has 2"),
        (['"a film,1', *["a good film,1"] * 9, '"a film,1'], 9, "line 2: 1 columns where the header has 2"),
        (['"He said "good" to me",1', *["a good film,1"] * 9], 10, ""),
        (['"a\nlong, ""good"" film",1', *["a good film,1"] * 9], 10, ""),
        (["sentence,label", *["a good film,1"] * 9], 9, "line 2: the header once more"),
    ],
)
def test_a_stray_quotation_mark_costs_its_own_line(
    rows: list[str], kept: int, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the lines up to the next one, or to the end of the file."""
    text = "\n".join(["sentence,label", *rows])
    found = read(tmp_path / "a.csv", text, "data.max_bad_fraction=0.3")
    assert len(found) == kept
    assert found[-1] == GOOD
    assert (fault in capsys.readouterr().err) if fault else not capsys.readouterr().err
    in_stream = reading.rows(iter([text]), "csv", [("sentence",)], None)
    if fault.endswith("has 2"):
        with pytest.raises(UserError, match=fault):
            list(in_stream)
    elif not fault:
        assert [row.columns["sentence"] for row in in_stream] == [one.first for one in found]


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("torn.tsv.zst", zstandard.compress(os.urandom(9000))[:5000], "cannot be read (it ends in the middle of its"),
        ("torn.tsv.gz", gzip.compress(os.urandom(9000))[:5000], "cannot be read (Compressed file ended before"),
        ("a.xlsx", b"PK\x03\x04\0\0\xff\0", "is not UTF-8; it is no text; write it as .csv, .tsv, .jsonl or .parquet"),
        ("twins.tsv", "sentence\tsentence\tlabel\na\tb\t1\n", "line 1: two columns are called 'sentence'; rename one"),
    ],
)
def test_what_is_no_table(name: str, data: str | bytes, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, data)
    assert str(caught.value).startswith(f"data.train={tmp_path / name}: ")
    assert line in str(caught.value)


IOB1 = "Ann|NNP|I-PER met|VBD|O a|b|NN|O\n\nRome|NNP|I-LOC\n"
CONLLU = "# sent_id = 1\n1-2\tdel\t_\tO\n1\tde\tx\tO\n2\tRoma\tx\tB-LOC\n2.1\tx\tx\tO\n"


def test_more_layouts_of_conll(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"line 1: I-PER after O: .*; or repair all such by data\.repair_tags=true"):
        tagged(path, IOB1)
    expected = [Sentence(("Ann", "met", "a|b"), ("B-PER", "O", "O")), Sentence(("Rome",), ("B-LOC",))]
    assert tagged(path, IOB1, "data.repair_tags=true") == expected
    with pytest.raises(UserError, match=r"the first column numbers the words; data\.columns=\[2,3\]"):
        tagged(path, CONLLU)
    assert tagged(path, CONLLU, "data.columns=[2,4]") == [
        Sentence(("del", "de", "Roma", "x"), ("O", "O", "B-LOC", "O"))
    ]
    assert tagged(path, "\u3000 O\nAnn B-PER\n\xa0 O\n") == [Sentence(("\u3000", "Ann", "\xa0"), ("O", "B-PER", "O"))]
    assert tagged(path, "# a\tcomment\nAnn B-PER\nmet O\n") == [Sentence(("Ann", "met"), ("B-PER", "O"))]
    with pytest.raises(UserError, match=r"line 1: is not UTF-8; set data\.encoding"):
        tagged(path, "España NP B-LOC\nes V O\nbonita A O\n".encode("latin-1"))


def test_tags_without_a_scheme(tmp_path: Path) -> None:
    """Repaired as if each word were inside; what is no tag of any scheme is not said to be mended so."""
    text = "New LOC\nYork LOC\nmet O\nAnn PER\n"
    with pytest.raises(UserError, match=r"line 1: tag 'LOC': O, or .*; or repair all such by data\.repair_tags=true$"):
        tagged(tmp_path / "a.txt", text)
    assert tagged(tmp_path / "a.txt", text, "data.repair_tags=true")[0].tags == ("B-LOC", "I-LOC", "O", "B-PER")
    for tag in ("_", "B_PER"):
        with pytest.raises(UserError, match=rf"tag '{tag}': O, or one of B-TYPE, I-TYPE is needed$"):
            tagged(tmp_path / "a.txt", f"New {tag}\n", "data.repair_tags=true")


def test_a_type_that_is_known_in_one_word_may_have_two() -> None:
    assert {*_with_siblings(["B-LOC", "O"])} == {"B-LOC", "I-LOC", "O"}
    assert {*_with_siblings(["S-LOC", "O"])} == {"S-LOC", "B-LOC", "I-LOC", "E-LOC", "O"}
    assert _with_siblings(["O", "O"]) == ["O", "O"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=1)


def asked(*rows: tuple[str, list[str]]) -> str:
    """SQuAD's rows of a question and its answers, all about one context."""
    context = "ann met bob"
    return "\n".join(
        json.dumps(
            {
                "question": question,
                "context": context,
                "answers": [{"text": one, "answer_start": context.index(one)} for one in answers],
            }
        )
        for question, answers in rows
    )


def test_a_question_that_is_too_long_is_cut(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of several; where it is more than a share, max_len is too short for these data."""
    good, long = ("who met?", ["bob"]), ("who " * 70, ["ann"])
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(asked(good, long, good))
    config = tiny_config(tmp_path, model, "task=squad", "max_len=64", suffix="jsonl")
    prepared = qa.prepare(config)
    assert "1 of 3 questions leave no room for a context at max_len=64, and are cut" in capsys.readouterr().err
    assert len(prepared.dev.guess) == 3
    assert all(len(row["input_ids"]) <= 64 for row in prepared.train)
    (tmp_path / "dev.jsonl").write_text(asked(long, long, good))
    with pytest.raises(UserError, match=r"max_len=64: a question has 70 tokens; raise max_len, or lower stride=32"):
        qa.prepare(config)


def one_value(task: str, text: str, prepare: Callable[[FinetuneConfig], object]) -> Callable[[Path, Path], str]:
    def told(folder: Path, model: Path) -> str:
        for name in ("train", "dev"):
            (folder / f"{name}.jsonl").write_text(text)
        with pytest.raises(UserError) as caught:
            prepare(tiny_config(folder, model, f"task={task}", suffix="jsonl"))
        return str(caught.value)

    return told


PAIR = '{"sentence1": "a", "sentence2": "b", "label": 3}\n{"sentence1": "c", "sentence2": "d", "label": 3.0}\n'


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (one_value("stsb", PAIR, classification.prepare), "every label is 3.0: there is nothing to learn"),
        (one_value("squad", asked(("who?", []), ("where?", [])), qa.prepare), "no question has an answer: there is"),
        (
            one_value("embedding", PAIR, lambda config: embedding._questions(both_sets(config)[1], config)),
            "every label is 3.0: scores would say nothing",
        ),
    ],
)
def test_targets_that_are_all_the_same(
    told: Callable[[Path, Path], str], line: str, model: Path, tmp_path: Path
) -> None:
    assert line in told(tmp_path, model)


def test_summaries_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"sentences": ["Ann met Bob.", "It rained."], "summary": ["Ann met Bob."]}
    rows = [whole] * 5 + [{**whole, "summary": ["", " "]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(documents(both_sets(settings(tmp_path / "a.jsonl", "task=summarization"))[0])) == 5
    told = '1 of 6 rows were left out; line 6: summary is ["", " "]; a text is needed there, or a list of texts'
    assert told in capsys.readouterr().err
    for own, fault in (
        ({"summary": None}, "summary is null; a text is needed"),
        ({"summary": 5}, "summary is 5; a text"),
        ({"sentences": ["", " "]}, "its sentences are blank"),
        ({"sentences": "Ann."}, r"sentences \(a list\) and summary are needed, there are sentences, summary"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps({**whole, **own}))
        with pytest.raises(UserError, match=fault):
            documents(both_sets(settings(tmp_path / "a.jsonl", "task=summarization"))[0])


def test_an_answer_of_another_program_s_offsets_is_found(tmp_path: Path) -> None:
    """Chinese, behind an emoji that counts twice in UTF-16."""
    row = {"question": "哪里", "context": "\U0001f600北京是首都", "answers": {"text": ["北京"], "answer_start": [2]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    found = qa.questions(both_sets(settings(tmp_path / "a.jsonl", "task=squad"))[0])
    assert found == [Question("line 1", "哪里", "\U0001f600北京是首都", ("北京",), 1)]
