"""Frozen probes: states are those of texts read one by one, scores are scikit-learn's, faults of files are one line."""

import gzip
import json
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModel, AutoTokenizer

from cloze.errors import ExitCode
from pretrain.evaluate import confidence, probing
from pretrain.evaluate.frozen_config import Pooling
from pretrain.evaluate.probe_data import PROBES, find_files, read
from pretrain.evaluate.states import encode, load_encoder, random_encoder, text_states, text_vectors, word_states
from pretrain.probes import main
from tests.unit.corpora import real
from tests.unit.tiny_bert import write_tiny_bert

TEXTS = ["good film", "bad a the very was", "ann met bob in rome", "rome", "the very very very bad film was"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def one_by_one(folder: Path, text: str) -> list[torch.Tensor]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return [x[0] for x in model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("pooling", Pooling)
def test_states_are_those_of_single_texts(model: Path, pooling: Pooling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.evaluate.states._BATCH_TOKENS", 20)  # several batches, with padding
    encoder = load_encoder(model, 64)
    found = text_states(encoder, encode(encoder, TEXTS, "x"), pooling)
    for row, text in enumerate(TEXTS):
        for layer, states_TH in enumerate(one_by_one(model, text)):
            wanted = states_TH[0] if pooling is Pooling.cls else states_TH.mean(0)
            np.testing.assert_allclose(found[layer, row], wanted, atol=1e-5)
    last = text_vectors(encoder, encode(encoder, TEXTS, "x"), pooling)
    np.testing.assert_allclose(last, found[-1] / np.linalg.norm(found[-1], axis=1, keepdims=True), atol=1e-5)


def test_words_have_the_state_of_their_first_piece(model: Path) -> None:
    encoder = load_encoder(model, 7)
    found, kept = word_states(encoder, encode(encoder, [["films", "a", "was"], ["the"] * 9], "x"))
    first, second = one_by_one(model, "films a was"), one_by_one(model, " ".join(["the"] * 5))
    assert kept == [[0, 1, 2], [0, 1, 2, 3, 4]], "words that were cut off have none"
    for layer in range(3):
        wanted = torch.cat([first[layer][[1, 3, 4]], second[layer][1:6]])  # films is two pieces
        np.testing.assert_allclose(found[layer], wanted, atol=1e-5)


def test_random_weights_are_others_of_the_same_shape(model: Path) -> None:
    encoder = load_encoder(model, 64)
    one, again, other = (random_encoder(encoder, seed).model.state_dict() for seed in (1, 1, 2))
    own = encoder.model.state_dict()
    name = "encoder.layer.0.output.dense.weight"
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in own.items()}
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], own[name])


labels = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(labels)
def test_scores_of_counts_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    gold, given_ = map(np.asarray, zip(*pairs, strict=True))
    counts = np.zeros((1, 3, 3))
    np.add.at(counts[0], (gold, given_), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of a single label
        assert probing.matthews(counts)[0] == pytest.approx(matthews_corrcoef(gold, given_), abs=1e-9)
    wanted = f1_score(gold, given_, labels=[0, 2], average="micro", zero_division=0.0)
    assert probing.tag_f1(counts, 1)[0] == pytest.approx(wanted, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=2, max_size=30))
def test_spearman_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.asarray(column, float) for column in zip(*pairs, strict=True))
    drawn = confidence.draw_examples(len(a), seed=1, num_draws=5)
    for row, score in zip(drawn, confidence.spearman(a, b, drawn), strict=True):
        varied = np.ptp(a[row]) > 0 and np.ptp(b[row]) > 0
        assert score == pytest.approx(spearmanr(a[row], b[row]).statistic if varied else 0.0, abs=1e-9)


def test_intervals_hold_what_is_true() -> None:
    """Of 100 samples of a coin that falls 70 to 30, some 95 intervals have 0.7 in them."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(100):
        tosses = rng.random(200) < 0.7
        found = confidence.interval(tosses[confidence.draw_examples(200, seed, 400)].mean(1))
        assert found.value == tosses.mean()
        hits += found.low <= 0.7 <= found.high
    assert 88 <= hits <= 100


def write_tasks(folder: Path) -> None:
    """The label of a sentence is its first word's, of a word whether it is a name; similarity is the share of words."""
    (folder / "sst2").mkdir()
    rows = [f"{'good' if i % 2 else 'bad'} {'very ' * (i % 5)}film\t{i % 2}" for i in range(60)]
    for name, part in (("train", rows[:40]), ("dev", rows[40:])):
        (folder / "sst2" / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(part) + "\n")
    (folder / "ner").mkdir()
    sentences = ["ann\tB-PER\nmet\tO\nbob\tB-PER\n", "the\tO\nfilm\tO\nin\tO\nrome\tB-LOC\n", "a\tO\nfilm\tO\n"] * 6
    for name in ("train", "dev"):
        (folder / "ner" / f"{name}.conll").write_text("\n".join(sentences))
    with zipfile.ZipFile(folder / "sentence_polarity.zip", "w") as archive:
        for name, word in (("neg", "bad"), ("pos", "good")):
            lines = "".join(f"the {word} {'very ' * (i % 7)}film\n" for i in range(25))
            archive.writestr(f"sentence_polarity/rt-polarity.{name}", lines)
    pairs = [("good film", "good film", 5), ("good film", "bad film", 3), ("good film", "ann met bob", 0)] * 8
    for name in ("train", "test"):
        (folder / f"stsb-en-{name}.csv").write_text("".join(f"{a},{b},{score}\n" for a, b, score in pairs))


def test_tables_over_layers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tasks(tmp_path)
    given_ = [f"model={model}", f"data={tmp_path}", "samples=40", "folds=3", "regularization=1", "random_seeds=2"]
    assert main([*given_, f"out={tmp_path}/new/probes.json"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert text.count("| embeddings |") == 5
    for line in (
        "sst2: accuracy, %; 40 learned from, 20 tested; always the same answer 50.0",
        "mr: accuracy, %; 26 learned from, 40 tested; always the same answer 50.0",
        "stsb, cosine: Spearman, %; 0 learned from, 24 tested\n",
        "stsb, ridge: Spearman, %; 24 learned from, 24 tested\n",
        "ner: F1 of tags, %; 54 learned from, 54 tested\n",
    ):
        assert line in text
    rows = [line.split(" | ") for line in text.split("\n") if line.startswith(("| embeddings", "| 1", "| 2"))]
    assert len(rows) == 15
    assert all(len(row) == 4 for row in rows)
    assert rows[0][1] == "100.0 (100.0 to 100.0)", "a word that tells the label is in the mean of the embeddings"
    body = json.loads((tmp_path / "new" / "probes.json").read_text())
    assert body["format"] == "cloze-probes"
    written = [layer["model"] for result in body["results"] for layer in result["layers"]]
    assert ["{:.1f} ({:.1f} to {:.1f})".format(*interval) for interval in written] == [row[1] for row in rows]
    assert main([*given_, f"out={tmp_path}/sst2/train.tsv"]) == ExitCode.USAGE
    assert "train.tsv: is there, and not one that Cloze wrote" in capsys.readouterr().err


BAD = {
    "sst2/train.tsv": [
        (b"", "holds no examples|no column"),
        (b"text\tlabel\na\t1\n", r"line 1: no column sentence; there are text, label"),
        (b"sentence\tlabel\ngood\n", r"line 2: 1 columns where 2 belong: sentence, label"),
        (b"sentence\tlabel\ngood\t1\n \t0\n", r"line 3: a text is empty"),
        (b"sentence\tlabel\ngood\t1\nb\xe4d\t0\n", r"line 3: not utf-8; convert it"),
        (b"sentence\tlabel\ngood\t1\nbad\t1\n", r"has one label only, '1'"),
    ],
    "sst2/dev.tsv": [(b"sentence\tlabel\ngood\t7\n", r"dev\.tsv: has labels that are not in .*train\.tsv: 7")],
    "stsb-en-train.csv": [
        (b"a,b,high\n", r"line 1: 'high': must be a number"),
        (b"a,1\n", r"line 1: 2 columns where 3 belong"),
    ],
    "ner/train.conll": [(b"a\tO\nb\n", r"line 2: 'b': a word and its tag are needed")],
    "sentence_polarity.zip": [(b"no archive", r"sentence_polarity\.zip!.*: cannot be read \(File is not a zip file\)")],
}


@pytest.mark.parametrize(("name", "data", "line"), [(name, *one) for name, kinds in BAD.items() for one in kinds])
def test_bad_files_are_one_line(
    name: str, data: bytes, line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path)
    (tmp_path / name).write_bytes(data)
    assert main([f"model={model}", f"data={tmp_path}"]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(line, error), error


def test_tasks_that_are_not_there(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given_, line in (
        ([f"data={tmp_path}/none"], "no such directory"),
        ([f"data={tmp_path}"], "has the files of no task"),
        (
            [f"data={tmp_path}", "tasks=[cola]"],
            "has no files of cola; cola/train.tsv or CoLA/train.tsv is needed there",
        ),
        ([f"data={tmp_path}", "tasks=[imdb]"], "no task imdb; there are sst2, cola"),
    ):
        assert main([f"model={model}", *given_]) == ExitCode.USAGE
        assert line in capsys.readouterr().err


def test_the_published_files_are_read() -> None:
    folder = real("glue/sst2/train.tsv").parents[2]
    sizes = {}
    for task in PROBES:
        if found := find_files(folder, task):
            sizes[task] = len(read(task, found[1] or found[0]))  # those of training are many
    with gzip.open(folder / "ner" / "msra" / "dev.conll.gz", "rt", encoding="utf-8") as file:
        blocks = sum(1 for block in file.read().split("\n\n") if block.strip())
    wanted = {"sst2": 872, "cola": 1043, "mr": 10662, "subj": 10000, "trec": 500, "mrpc": 1725, "ner": blocks}
    assert sizes == {**wanted, "stsb": 1379, "stsb_zh": 1379}
