"""Fine-tuning: files as users have them, scores against slow formulas, a tiny model that learns in seconds."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
)

from data_prep import entry
from data_prep.errors import UserError
from finetune.__main__ import main
from finetune.classification import Example, read_examples, scores
from finetune.config import FinetuneConfig

WORDS = ["good", "bad", "film", "a", "the", "very", "was"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT as `pretrain.export` writes it: pretraining heads and tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertForPreTraining(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def config(folder: Path, model: Path, *overrides: str) -> FinetuneConfig:
    defaults = (f"model={model}", f"data.train={folder}/train.tsv", f"data.dev={folder}/dev.tsv", f"out={folder}/out")
    return entry.compose("finetune", FinetuneConfig, [*defaults, "batch_size=8", "optim.lr=3e-3", *overrides])


def write_tsv(path: Path, count: int, seed: int) -> None:
    """Sentences of up to 30 words, longer than the model's positions; "good" or "bad" tells the label."""
    rng = np.random.default_rng(seed)
    rows = ["label\tid\tsentence"]
    for number in range(count):
        label = "pos" if rng.random() < 0.5 else "neg"
        words = list(rng.choice(WORDS[2:], rng.integers(1, 30)))
        rows.append(f'{label}\t{number}\t{" ".join(["good" if label == "pos" else "bad", *words])} "')
    path.write_text("\n".join(rows) + "\n")


def test_learns_writes_scores_and_a_model_that_loads(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tsv(tmp_path / "train.tsv", 160, 1)
    write_tsv(tmp_path / "dev.tsv", 50, 2)
    assert main(config(tmp_path, model, "epochs=6")) == 0
    body = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert body["labels"] == ["neg", "pos"]
    assert (body["train_examples"], body["dev_examples"]) == (160, 50)
    assert f"accuracy {body['accuracy']:.4f}  macro_f1 {body['macro_f1']:.4f}" in capsys.readouterr().out
    assert body["accuracy"] > 0.9
    # the written directory stands alone and gives the same predictions
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    examples = read_examples(tmp_path / "dev.tsv", "data.dev")
    right = 0
    for example in examples:
        encoded = tokenizer(example.first, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            right += loaded.config.id2label[int(loaded(**encoded).logits.argmax())] == example.label
    assert right / len(examples) == pytest.approx(body["accuracy"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev.tsv", "out", "train.tsv"]


def test_pairs_in_jsonl_and_the_same_seed_twice(tmp_path: Path, model: Path) -> None:
    rows = [{"sentence1": "good film", "sentence2": "bad", "label": i % 3, "idx": i} for i in range(30)]
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    files = [f"data.train={tmp_path}/train.jsonl", f"data.dev={tmp_path}/dev.jsonl", "epochs=1"]
    bodies = []
    for out in ("a", "b"):
        assert main(config(tmp_path, model, *files, f"out={tmp_path / out}")) == 0
        bodies.append(json.loads((tmp_path / out / "metrics.json").read_text()))
        assert bodies[-1]["labels"] == ["0", "1", "2"]
    assert bodies[0] == bodies[1]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def fill_out(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "kept").write_text("mine")


GOOD = "sentence\tlabel\na\tx\nb\ty\n"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (remove("train.tsv"), r"data\.train=.*/train\.tsv: no such file"),
        (remove("dev.tsv"), r"data\.dev=.*/dev\.tsv: no such file"),
        (
            put("train.tsv", "text\tgold\na\tx\n"),
            r"no sentence1 and no sentence2 and no label.* columns are text, gold",
        ),
        (put("dev.tsv", "sentence\tgold\na\tx\n"), r"data\.dev=.*: line 2: no label; .* columns are sentence, gold"),
        (put("dev.tsv", "sentence1\tlabel\na\tx\n"), r"no sentence2"),
        (put("dev.tsv", "sentence\tlabel\na\tx\textra\n"), r"line 2: 3 columns where the header has 2"),
        (put("dev.tsv", "sentence\tlabel\na\tz\n"), r"labels that data\.train lacks: z; data\.train has x, y"),
        (put("dev.tsv", "sentence\tlabel\n"), r"data\.dev=.*: holds no examples"),
        (put("dev.tsv", ""), r"data\.dev=.*: holds no examples"),
        (put("dev.tsv", "sentence1\tsentence2\tlabel\na\tb\tx\n"), r"one of data\.train and data\.dev has pairs"),
        (put("train.tsv", "sentence\tlabel\na\tx\n"), r"every label is 'x'"),
        (fill_out, r"out=.*: not empty"),
        (remove("model/config.json"), r"model=.*: no config\.json"),
        (lambda f: [(f / "model" / n).unlink() for n in ("vocab.txt", "tokenizer.json")] and None, r"has no tokenizer"),
        (put("model/config.json", '{"model_type": "nope"}'), r"model=.*: cannot be loaded"),
        (remove("model/model.safetensors"), r"model=.*: cannot be loaded"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], None], expected: str, tmp_path: Path, model: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(GOOD)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=expected) as caught:
        main(config(tmp_path, tmp_path / "model", "epochs=1"))
    assert caught.value.exit_code == 64
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_jsonl_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence"\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_examples(path, "data.train")
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        read_examples(path, "data.train")
    path.write_bytes(b'\xef\xbb\xbf{"sentence": "a", "label": 0}\r\n')
    assert read_examples(path, "data.train") == [Example("a", None, "0")]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_examples(path, "data.train")


@pytest.mark.parametrize("bad", ["epochs=0", "max_len=2", "optim.lr=0", "task=nope", "batch_size=x"])
def test_bad_values_are_refused_before_anything_is_read(bad: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        config(tmp_path, tmp_path, bad)


@given(
    st.integers(2, 5).flatmap(lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1))
)
def test_scores_against_slow_formulas(pairs: list[tuple[int, int]]) -> None:
    labels = np.asarray([label for label, _ in pairs])
    predicted = np.asarray([guess for _, guess in pairs])
    result = scores(labels, predicted, 5)
    assert result["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    f1 = []
    for name in {number for pair in pairs for number in pair}:
        hits = sum(a == b == name for a, b in pairs)
        f1.append(2 * hits / (sum(a == name for a, _ in pairs) + sum(b == name for _, b in pairs)))
    assert result["macro_f1"] == pytest.approx(sum(f1) / len(f1))
    # Matthews' correlation is Pearson's over the one-hot columns together
    one_hot = [np.eye(5)[values] - np.eye(5)[values].mean(axis=0) for values in (labels, predicted)]
    spread = math.sqrt((one_hot[0] ** 2).sum() * (one_hot[1] ** 2).sum())
    assert result["matthews"] == pytest.approx((one_hot[0] * one_hot[1]).sum() / spread if spread > 1e-9 else 0.0)
