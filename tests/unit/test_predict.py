"""Labelling files: families say what their evaluation says, rows keep their order, a kill leaves the same bytes."""

import bz2
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, BertForSequenceClassification, pipeline

from cloze import cli
from cloze.errors import UserError
from finetune import predict as command
from finetune.config import FinetuneConfig, PredictConfig
from finetune.keys import Precision
from finetune.prediction import model as running
from finetune.prediction import reading, writing
from finetune.prediction.trained import trained
from finetune.predictor import encoded
from finetune.readers import Row
from finetune.train import run as finetune
from tests.unit.tiny_bert import WORDS, config, write_tiny_bert

TEXTS = ["good film", "bad a the very was", "ann met bob", "", "rome " * 70, "日本 film?", "the film was very very bad"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def plain(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that Hugging Face's own code wrote."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    write_tiny_bert(folder)
    torch.manual_seed(1)
    labels = {0: "no", 1: "so-so", 2: "yes"}
    wild = BertConfig.from_pretrained(folder, num_labels=3, id2label=labels, initializer_range=0.5)  # answers differ
    BertForSequenceClassification(wild).save_pretrained(folder)
    return folder


def predicted(model: Path, read: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """What the command writes into a file of JSON lines."""
    assert command.main([f"model={model}", f"in={read}", f"out={out}", *overrides]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def rows_of(task: str) -> list[dict[str, Any]]:
    """A dozen examples; one is too long, and the texts differ in length."""
    rng = random.Random(task)
    texts = [" ".join(rng.choices(WORDS[:7], k=rng.choice((1, 3, 8, 20)))) for _ in range(12)]
    if task == "squad":
        return [
            {"id": str(i), "question": "who " * (i % 3 + 1), "context": f"{text} bob {text}",
             "answers": [] if i % 4 == 0 else [{"text": "bob", "answer_start": len(text) + 1}]}
            for i, text in enumerate(texts)
        ]  # fmt: skip
    if task == "summarization":
        return [{"sentences": [text, "ann met bob", *texts[: i % 4]], "summary": text} for i, text in enumerate(texts)]
    if task == "regression":
        return [{"text": text, "label": text.count("good") / 2} for text in texts]
    return [
        {"sentence1": text, "sentence2": "very", "label": "good" if i % 3 else "bad"} for i, text in enumerate(texts)
    ]


def learned(task: str, folder: Path, pretrained: Path) -> FinetuneConfig:
    """Fine-tunes on the file that is then labelled."""
    more = ["max_len=24", "stride=4", "top_sentences=1", "epochs=1"]
    if task == "ner":
        lines = ["ann B-PER\nwas O\nin O\nrome B-LOC\nfilms I-LOC\n", "the O\nfilm O\n", "bob B-PER\n"] * 6
        text = "\n".join([*lines, "very O\n" * 30])
        more += ["head=crf", "optim.crf_lr=0.1", "epochs=12"]
    else:
        text = "\n".join(map(json.dumps, rows_of(task)))
    suffix = "conll" if task == "ner" else "jsonl"
    more += ["data.columns=[text,label]"] if task == "regression" else []
    for part in ("train", "dev"):
        (folder / f"{part}.{suffix}").write_text(text)
    found = config(folder, pretrained, f"task={task}", *more, suffix=suffix)
    finetune(found)
    return found


@pytest.mark.parametrize("task", ["classification", "regression", "ner", "squad", "summarization"])
def test_every_family_says_what_its_evaluation_says(task: str, pretrained: Path, tmp_path: Path) -> None:
    """The reference runs the samples of the evaluation one by one, and reads them as the evaluation does."""
    found = learned(task, tmp_path, pretrained)
    rows = predicted(tmp_path / "out", Path(str(found.data.dev)), tmp_path / "labels.jsonl", "batch_tokens=60")
    prepared = found.definition.family.prepare(replace(found, model=str(tmp_path / "out")))
    model = prepared.make_model().eval()
    outputs = []
    for feature in prepared.dev.features:
        batch = prepared.collate([dict(feature)])
        with torch.no_grad():
            one = model(**{name: ids for name, ids in batch.items() if name not in prepared.label_columns})
        names = ("start_logits", "end_logits") if task == "squad" else ("logits",)
        outputs.append([one[name][0].numpy() for name in names])
    if task in ("squad", "ner", "summarization"):  # as the Trainer pads them
        width = max(len(arrays[0]) for arrays in outputs)
        outputs = [
            [np.pad(a, [(0, width - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=-100) for a in arrays]
            for arrays in outputs
        ]
    joined = tuple(np.stack(arrays) for arrays in zip(*outputs, strict=True))
    answers = prepared.dev.decide(joined if len(joined) > 1 else joined[0], model)
    if task == "ner":
        assert [row["prediction"] for row in rows] == answers
        assert "B-PER" in answers[0]
        assert rows[0]["column2"] == ["B-PER", "O", "O", "B-LOC", "I-LOC"]
        assert answers[-1] == ["O"] * 30
        return
    given = rows_of(task)
    assert [{name: row[name] for name in given[0]} for row in rows] == given
    close = pytest.approx(answers, abs=1e-5) if task == "regression" else answers
    assert [row["prediction"] for row in rows] == close
    if task == "squad":
        assert all(row["context"][row["start"] : row["end"]] == row["prediction"] for row in rows if row["prediction"])


def test_a_plain_directory_says_what_transformers_pipeline_says(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    rows = predicted(plain, tmp_path / "in.txt", tmp_path / "out.jsonl", "probabilities=true")
    theirs = pipeline("text-classification", str(plain), device="cpu")(
        TEXTS, truncation=True, max_length=64, top_k=None
    )
    assert [row["text"] for row in rows] == TEXTS
    assert len({row["prediction"] for row in rows}) > 1
    for row, scores in zip(rows, theirs, strict=True):
        assert row["prediction"] == scores[0]["label"]
        assert row["probability"] == pytest.approx(scores[0]["score"], abs=2e-6)
        assert row["probabilities"] == pytest.approx({one["label"]: one["score"] for one in scores}, abs=2e-6)


@pytest.fixture(scope="module")
def runner(plain: Path) -> Callable[[list[str], int], list[dict[str, Any]]]:
    """Labels texts in one window by batches of so many tokens."""
    asked = cli.compose("predict", PredictConfig, [f"model={plain}", "in=x.txt", "out=y.txt", "probabilities=true"])
    known = trained(asked)
    from finetune.families.classification import predictor

    found = predictor(known, Row("", {"text": ""}))
    run, _ = running.loaded(known, found, Precision.fp32)

    def label(texts: list[str], batch_tokens: int) -> list[dict[str, Any]]:
        window = [Row("line", {"text": text}) for text in texts]
        return [*running.answers(found.encode(window), run, batch_tokens, known.tokenizer)]

    return label


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=12), st.integers(1, 99)
)
def test_any_batches_give_what_single_texts_give(
    runner: Callable[[list[str], int], list[dict[str, Any]]], texts: list[str], batch_tokens: int
) -> None:
    together, alone = runner(texts, batch_tokens), [runner([text], 1)[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_batches_hold_every_sample_once_and_no_more_tokens_than_allowed(lengths: list[int], tokens: int) -> None:
    found = [*running.batches(lengths, tokens)]
    assert sorted(number for batch in found for number in batch) == [*range(len(lengths))]
    assert all(
        len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= max(tokens, len(batch)) for batch in found
    )


def test_the_quick_tokenizer_gives_what_the_usual_call_gives(plain: Path) -> None:
    asked = cli.compose("predict", PredictConfig, [f"model={plain}", "in=x.txt", "out=y.txt", "max_len=8"])
    known = trained(asked)
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    for found in ([(text,) for text in TEXTS], pairs):
        features, cut = encoded(found, known)
        usual = known.tokenizer(*map(list, zip(*found, strict=True)), truncation=True, max_length=8)
        whole = known.tokenizer(*map(list, zip(*found, strict=True)))
        assert [feature["input_ids"] for feature in features] == usual.input_ids
        assert [feature["token_type_ids"] for feature in features] == usual.token_type_ids
        assert cut == [number for number, ids in enumerate(whole.input_ids) if len(ids) > 8]


# Killed and gone on with


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.tsv.gz"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle of its third write, of which half is on the disk."""
    monkeypatch.setattr(command, "_WINDOW_ROWS", 3)
    (tmp_path / "in.tsv").write_text("n\ttext\n" + "".join(f"{i}\t{TEXTS[i % 7]}\n" for i in range(20)))
    arguments = [f"model={plain}", f"in={tmp_path}/in.tsv"]
    assert command.main([*arguments, f"out={tmp_path}/whole-{name}"]) == 0
    whole = (tmp_path / f"whole-{name}").read_bytes()
    warnings = capsys.readouterr().err.splitlines()[-3:-1]
    append, calls = writing.Part.append, []

    def killed(self: writing.Part, text: str, num_rows: int) -> None:
        calls.append(num_rows)
        if len(calls) == 3:
            with (tmp_path / f"{name}.part").open("ab") as file:
                file.write(b"half of a ro")
            raise KeyboardInterrupt
        append(self, text, num_rows)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Part, "append", killed)
        assert command.main([*arguments, f"out={tmp_path}/{name}"]) == 75
    assert not (tmp_path / name).exists()
    assert command.main([*arguments, f"out={tmp_path}/{name}", "max_len=9"]) == 64
    assert "out.part: was begun with another max_len" in capsys.readouterr().err.replace(name, "out")
    with monkeypatch.context() as patch:
        patch.setattr(writing.Part, "append", lambda self, text, n: (calls.append(n), append(self, text, n))[1])
        calls.clear()
        assert command.main([*arguments, f"out={tmp_path}/{name}"]) == 0
    assert sum(calls) == 14
    assert (tmp_path / name).read_bytes() == whole
    assert capsys.readouterr().err.splitlines()[-3:-1] == warnings
    assert "longer than 64 tokens, and cut: 3 of 20 rows, the first in=" in warnings[0]
    assert re.search(r"an empty text, labelled as it is: 3 of 20 rows, the first in=.*/in\.tsv: line 5$", warnings[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.tsv", name, f"whole-{name}"])
    text = gzip.decompress(whole).decode() if name.endswith(".gz") else whole.decode()
    if name == "out.json":
        assert [row["n"] for row in json.loads(text)] == [str(i) for i in range(20)]
    elif "tsv" in name:
        assert [line.split("\t")[0] for line in text.splitlines()] == ["n", *map(str, range(20))]


def test_a_run_killed_at_its_end_ends_once(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its last words and its name."""
    (tmp_path / "in.txt").write_text("good\nfilm\n")
    arguments = [f"model={plain}", f"in={tmp_path}/in.txt", f"out={tmp_path}/out.json"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        assert command.main(arguments) == 75
    assert (tmp_path / "out.json.part").read_text().endswith("]\n")
    assert command.main(arguments) == 0
    assert [row["text"] for row in json.loads((tmp_path / "out.json").read_text())] == ["good", "film"]


def test_what_is_not_ours_stays(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("good\n")
    out, part, mark = (tmp_path / name for name in ("out.tsv", "out.tsv.part", "out.tsv.part.json"))
    arguments = [f"model={plain}", f"in={tmp_path}/in.txt", f"out={out}"]
    for path, error in (
        (out, f"out={out}: is there already; name another file, or move it away"),
        (part, f"{part}: is there, and not one that Cloze wrote; name another file, or move it away"),
        (mark, f"{mark}: is there, and not one that Cloze wrote; name another file, or move it away"),
    ):
        path.write_text("mine")
        assert command.main(arguments) == 64
        assert capsys.readouterr().err == f"error: {error}\n"
        assert path.read_text() == "mine"
        path.unlink()
    with writing.Part(out, {}):
        assert command.main(arguments) == 64
        assert capsys.readouterr().err == f"error: out={out}: another process is writing it; let it end\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


# Files


def opened(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3), max_size=6), st.randoms())
def test_json_in_any_layout_and_any_pieces(rows: list[dict[str, str]], rng: random.Random) -> None:
    dumped = [json.dumps(row, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1))) for row in rows]
    for text in ("\n".join(dumped), "".join(dumped), f" [{', '.join(dumped)} ]\n"):
        cuts = sorted(rng.randint(0, len(text)) for _ in range(4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert [row.columns for row in reading.json_rows(parts)] == rows


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tsv", bytes), ("x.tsv.gz", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        ("x.tsv.zst", lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:])),
        ("x.TSV.bz2", bz2.compress),
        ("x.tsv", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
        ("x.tsv", lambda d: d.replace(b"\n", b"\r")),
    ],
)  # fmt: skip
def test_compressed_marked_and_foreign_line_ends(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = opened(tmp_path, name, pack('a\tb\n1\t"é\n\n2\t\n'.encode()))
    found = [*reading.rows(reading.blocks(path), reading.format_of(path, None), (), None)]
    assert found == [Row("line 2", {"a": "1", "b": '"é'}), Row("line 4", {"a": "2", "b": ""})]


def test_encodings(tmp_path: Path) -> None:
    text = "text\né日\n" * 3
    for encoding, key in (("utf-16", None), ("utf-32", None), ("gb18030", "gb18030"), ("utf-16-le", "utf-16-le")):
        path = opened(tmp_path, "x.txt", text.encode(encoding))
        assert "".join(reading.blocks(path, key)) == text
    path = opened(tmp_path, "x.txt", "a\nb\n".encode("utf-16-le") + b"\x00\xd8\n\x00")
    with pytest.raises(UserError, match="line 3: not UTF-16-LE"):
        [*reading.blocks(path, "utf-16-le")]


def test_an_empty_line_is_a_text_where_there_is_one_column(tmp_path: Path) -> None:
    for name, data in (("x.tsv", "text\na\n\nb\n"), ("x.csv", 'text\n"a"\n\n"b"\n'), ("x.txt", "a\n\nb")):
        path = opened(tmp_path, name, data.encode())
        found = reading.rows(reading.blocks(path), reading.format_of(path, None), (), None)
        assert [row.columns["text"] for row in found] == ["a", "", "b"]


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("x.tsv", b"text\nok\nna\xefve\n", "line 3: not UTF-8 (byte 0xef); set encoding: gb18030, latin-1, …"),
        ("x.tsv", b"id\ttext\n1\ta\n2\n", "line 3: 1 columns where the header has 2; mend it"),
        ("x.csv", b"text,n\n\"a,\n,b\",1\nb\n", "line 4: 1 columns where the header has 2; mend it"),
        ("x.tsv", b"text\ttext\na\tb\n", "line 1: two columns are called 'text'; rename one"),
        ("x.tsv", b"txt\tn\na\t1\n", "line 2: the columns sentence1, sentence2 or sentence or text are needed"),
        ("x.csv", b"txt\na\n", "or text are needed, there are txt; columns=[…] names others"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "2: not JSON (Expecting ',' delimiter, line 3)"),
        ("x.json", b'[{"text": "a"}, 3]', "item 2: '3' is not a JSON object, with a name for each value; mend it"),
        ("x.json", b'[{"text": "a"}', "item 2: not JSON (Expecting value, line 1); mend it"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2: has no text; there are txt"),
        ("x.jsonl", b'{"text": ["a"]}\n', 'line 1: text is ["a"]; a text is needed there'),
        ("x.jsonl", b'{"text": "a", "prediction": 1}', "line 1: has a column prediction; set prefix=new_, say"),
        ("x.jsonl", b" \n", "holds no rows"), ("x.tsv", b"text\n", "holds no rows"), ("x.txt", b"", "holds no rows"),
        ("x.tsv.gz", gzip.compress(b"text\na\n" * 99, mtime=0)[:-9], "cannot be read (Compressed file ended before"),
        ("x.tsv.zst", zstandard.compress(b"text\na\n" * 99)[:-3], "cannot be read (it ends in the middle of its"),
        ("x.foo", b"a\n", "its name tells no format; add in_format=tsv|csv|jsonl|text|conll"),
        ("x.conll", b"1\tann\tO\n2\tmet\tO\n", "the first column numbers the words; columns=[2] says where"),
        ("x.conll", b"bob\nmet O\n", "line 2: 2 columns where the line before has 1; mend it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    name: str, data: bytes, error: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = opened(tmp_path, name, data)
    assert command.main([f"model={plain}", f"in={path}", f"out={tmp_path}/out.jsonl"]) == 64
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith(f"error: in={path}: ")
    assert error in found
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("model=/none",), "model=/none: no config.json there"), (("in=none.txt",), "in=none.txt: no such file"),
        (("out=in.txt/x.txt",), "out=in.txt/x.txt: in.txt is a file; name another file"),
        (("out=x.foo",), "out=x.foo: its name tells no format; add format=tsv|csv|jsonl|json|text|conll|glue|squad"),
        (("out=x.tsv.zst",), "out=x.tsv.zst: is written plain or as .gz"), (("task=foo",), "task=foo: no such task"),
        (("out=s3://a/x.tsv",), "out=s3://a/x.tsv: must be on this machine"),
        (("max_len=65",), "has positions for 64 tokens; lower it"),
        (("task=sst2",), "has 3 labels (no, so-so, yes), the"),
        (("encoding=foo",), "encoding=foo: no such encoding"),
        (("format=glue",), "format=glue: the model is of none of GLUE's tasks"), (("in=",), "in: empty"),
        (("out=x.conll",), "format=conll: is of words and tags"),
        (("outt=x",), "outt: no such key (did you mean out?)"),
        (("task=ner", "columns=[a]"), "the columns a are needed, there are text"),
        (("task=ner",), "is BertForSequenceClassification, and task=ner needs …ForTokenClassification"),
        (("task=summarization",), "the columns sentences are needed"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    overrides: tuple[str, ...], error: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("good\n")
    assert command.main([f"model={plain}", "in=in.txt", "out=out.tsv", *overrides]) == 64
    assert error in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_the_three_may_stand_alone_and_have_their_key(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's (one) [数据]"
    folder.mkdir()
    (folder / "in.txt").write_text("good\n")
    assert command.main([str(plain), str(folder / "in.txt"), str(folder / "out.tsv"), "prefix=a_"]) == 0
    assert (folder / "out.tsv").read_text().startswith("text\ta_prediction\ta_probability\ngood\t")
    assert capsys.readouterr().out == f"{folder}/out.tsv: 1 rows\n"
    assert command.main([str(plain)]) == 64
    assert capsys.readouterr().err.startswith("error: in: has no value; add in=… to the command line")
    assert command.main(["--help"]) == 0
    assert re.search(r"^  in  +file or URL to read: [^\[]*\[required\]$", capsys.readouterr().out, re.MULTILINE)


# Formats


def test_submissions_have_labels_as_glue_asks_for_them() -> None:
    from finetune.families import TASKS

    for task, prediction, expected in (
        ("sst2", "positive", "1"), ("cola", "unacceptable", "0"), ("wnli", "entailment", "1"),
        ("mrpc", "equivalent", "1"),
        ("qnli", "not_entailment", "not_entailment"), ("mnli", "neutral", "neutral"), ("stsb", 5.3, "5.000"),
        ("stsb", 2.71828, "2.718"),
    ):  # fmt: skip
        table = writing.table("glue", ["index"], ["prediction"], TASKS[task])
        assert table.head == "index\tprediction\n"
        assert table.row(3, Row("", {}), {"prediction": prediction}) == f"3\t{expected}\n"
        assert table.row(3, Row("", {"index": "7"}), {"prediction": prediction}) == f"7\t{expected}\n"
    with pytest.raises(UserError, match="format=glue: 'x' is no label of the task, whose are negative, positive"):
        writing.table("glue", [], ["prediction"], TASKS["sst2"]).row(0, Row("", {}), {"prediction": "x"})


def test_a_task_that_the_directory_does_not_tell(plain: Path, tmp_path: Path) -> None:
    """The labels of a hub's model may be numbers: the task names them, and where its texts stand."""
    folder = tmp_path / "model"
    write_tiny_bert(folder)
    BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=2)).save_pretrained(folder)
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n" + "".join(f"{i}\tgood\tbad\n" for i in range(3)))
    arguments = [str(folder), str(tmp_path / "test.tsv")]
    assert command.main([*arguments, str(tmp_path / "RTE.tsv"), "task=rte", "format=glue"]) == 0
    head, *lines = (tmp_path / "RTE.tsv").read_text().splitlines()
    assert head == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines} <= {"entailment", "not_entailment"}


def test_tables_keep_cells_and_say_where_columns_differ() -> None:
    row = Row("line 1", {"a": "x\ty\n", "b": None, "c": [1, "é"], "d": '"'})
    for kind, expected in (("tsv", 'x y \t\t[1, "é"]\t"\t0.5\n'), ("csv", '"x\ty\n",,"[1, ""é""]","""",0.5\n')):
        table = writing.table(kind, [*row.columns], ["p"], None)
        assert table.row(0, row, {"p": 0.5}) == expected
        with pytest.raises(UserError, match="line 2: has e, which the first row lacks; name a"):
            table.row(1, Row("line 2", {"e": 1}), {"p": 0.5})
    assert writing.table("text", ["a"], ["p"], None).row(0, row, {"p": "one\ntwo"}) == "one two\n"


def test_conll_comes_out_as_it_went_in_with_one_column_more() -> None:
    from finetune.families.tagging import conll_stream

    text = "-DOCSTART- O\n\n# sent_id = 1\nann NNP B-PER\n# SYM O\n\n\nbob NNP B-PER\n"
    rows = [*conll_stream(text.split("\n"), ())]
    assert [row.columns["words"] for row in rows] == [["ann", "#"], ["bob"]]
    assert [row.place for row in rows] == ["line 4", "line 8"]
    table = writing.table("conll", [*rows[0].columns], ["prediction"], None)
    out = "".join(table.row(0, row, {"prediction": ["X"] * len(row.columns["words"])}) for row in rows)
    expected = "-DOCSTART- O\n# sent_id = 1\nann\tNNP\tB-PER\tX\n#\tSYM\tO\tX\n\nbob\tNNP\tB-PER\tX\n\n"
    assert out == expected
    (second,) = conll_stream(["1\tann", "2\tmet"], ("2",))
    assert second.columns == {"column1": ["1", "2"], "words": ["ann", "met"]}


def test_vectors_are_mean_states(pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,n\n" + "".join(f"{text},{i}\n" for i, text in enumerate(TEXTS[:4])))
    rows = predicted(pretrained, tmp_path / "in.csv", tmp_path / "out.jsonl")
    model = AutoModel.from_pretrained(pretrained).eval()
    tokenizer = trained(
        cli.compose("predict", PredictConfig, [f"model={pretrained}", "in=x.txt", "out=y.txt"])
    ).tokenizer
    for row, text in zip(rows, TEXTS, strict=False):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert row["vector"] == pytest.approx(states.mean(0).tolist(), abs=1e-5)


def test_vectors_of_sentence_transformers(pretrained: Path, tmp_path: Path) -> None:
    from finetune.prediction.vectors import pooling

    states = np.asarray([[3.0, 4.0], [1.0, 0.0]], np.float32)
    kinds = ("Transformer", "1_Pooling.Pooling", "2_Normalize.Normalize")
    modules = [{"path": kind.partition(".")[0] if "_" in kind else "", "type": f"st.{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    for how, expected in (("cls_token", [0.6, 0.8]), ("mean_tokens", [2 / 8**0.5, 2 / 8**0.5])):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{how}": True, "word": 2}))
        assert pooling(tmp_path)(states).tolist() == pytest.approx(expected)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="its pooling is max_tokens; mean or cls is needed"):
        pooling(tmp_path)


def test_entities_of_texts_are_where_they_stand(pretrained: Path, tmp_path: Path) -> None:
    learned("ner", tmp_path, pretrained)
    (tmp_path / "in.txt").write_text("  ann was in rome films.\n\nthe film\n")
    rows = predicted(tmp_path / "out", tmp_path / "in.txt", tmp_path / "labels.jsonl")
    words = predicted_words(tmp_path, ["ann", "was", "in", "rome", "films", "."])
    for row in rows:
        assert all(row["text"][one["start"] : one["end"]] == one["text"] for one in row["prediction"])
    assert [(one["type"], one["text"]) for one in rows[0]["prediction"]] == words
    assert rows[1]["prediction"] == []


def predicted_words(folder: Path, words: list[str]) -> list[tuple[str, str]]:
    from finetune.families.tagging import entities

    (folder / "words.jsonl").write_text(json.dumps({"tokens": words}))
    (row,) = predicted(folder / "out", folder / "words.jsonl", folder / "words-out.jsonl")
    found = sorted((start, after, kind) for kind, start, after in entities(row["prediction"]))
    return [(kind, " ".join(words[start:after])) for start, after, kind in found]


def test_memory_is_that_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read as they are needed, and few or long ones make a window."""
    monkeypatch.setattr(command, "_WINDOW_ROWS", 5)
    monkeypatch.setattr(command, "_WINDOW_CHARACTERS", 100)
    taken = 0

    def rows() -> Iterator[Row]:
        nonlocal taken
        for taken in range(1, 10**9):
            yield Row("", {"text": "x" * (60 if taken > 5 else 1), "more": ["y"]})

    windows = command._windows(rows())
    assert [len(next(windows)) for _ in range(3)] == [5, 2, 2]
    assert taken == 9
