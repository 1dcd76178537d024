"""What the head reads and when it learns: the mean of the states, the head before the rest, layers that begin anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from cloze.errors import UserError
from finetune import compress, predict
from finetune.__main__ import finetune
from finetune.models import load_model
from finetune.pooled_classifier import load_pooled
from finetune.techniques.layers import depth, reinitialize
from finetune.train import TaskTrainer
from pretrain.export.card import CARD
from tests.unit.tiny_bert import config, write_tiny_bert

TEXTS = ["good film", "bad", "a very bad film was in rome"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\n" + "good film\tx\nbad film\ty\n" * 8)
    return tmp_path


def test_a_head_upon_the_mean(folder: Path, model: Path) -> None:
    """Its directory is one of sentence-transformers, whose vectors are the logits: here by hand, text by text."""
    assert finetune(config(folder, model, "pooling=mean", "epochs=9"))["accuracy"] == 1
    out = folder / "out"
    body = json.loads((out / "metrics.json").read_text())
    assert (body["pooled_head"], body["config"]["pooling"]) == ("mean", "mean")
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense"]
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    dense = load_file(out / "2_Dense" / "model.safetensors")
    encoder, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    logits = []
    with torch.no_grad():
        for text in TEXTS:
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            logits.append(dense["linear.weight"] @ states.mean(0) + dense["linear.bias"])
        padded = load_pooled(out)(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(padded, torch.stack(logits), atol=1e-5, rtol=1e-4)
    (folder / "in.txt").write_text("\n".join(TEXTS))
    assert predict.main([f"model={out}", f"in={folder}/in.txt", f"out={folder}/labels.txt"]) == 0
    answers = [body["labels"][int(one.argmax())] for one in logits]
    assert (folder / "labels.txt").read_text().split() == answers
    assert "load_pooled" in (out / CARD).read_text()


def test_a_head_upon_the_mean_is_learned_further(folder: Path, model: Path) -> None:
    """It begins where it was; for other labels it is refused, as transformers' own is."""
    finetune(config(folder, model, "pooling=mean", "epochs=1"))
    finetune(config(folder, folder / "out", "epochs=1", "optim.lr=1e-12", f"out={folder}/b"))
    first, second = (load_file(folder / name / "2_Dense" / "model.safetensors") for name in ("out", "b"))
    torch.testing.assert_close(first, second)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\na\t0\nb\t1\nc\t2\n")
    with pytest.raises(
        UserError, match=r"out: was fine-tuned for 2 labels, the data have 3; name the pretrained model"
    ):
        finetune(config(folder, folder / "out", f"out={folder}/d"))


def test_sentence_transformers_gives_the_logits(folder: Path, model: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers")
    finetune(config(folder, model, "pooling=mean", "epochs=1", "max_len=24"))
    out, texts = folder / "out", [*TEXTS, "the very bad film was " * 9]
    encoded = AutoTokenizer.from_pretrained(out)(
        texts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.inference_mode():
        wanted = load_pooled(out)(**encoded).logits
    np.testing.assert_allclose(theirs.SentenceTransformer(str(out), device="cpu").encode(texts), wanted, atol=1e-5)


def test_modernbert_s_own_head_has_both(folder: Path, model: Path) -> None:
    modern = folder / "modern"
    AutoTokenizer.from_pretrained(model).save_pretrained(modern)
    shape = ModernBertConfig(
        vocab_size=21, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    ModernBertForMaskedLM(shape).save_pretrained(modern)
    finetune(config(folder, modern, "pooling=mean", "epochs=1"))
    assert AutoModelForSequenceClassification.from_pretrained(folder / "out").config.classifier_pooling == "mean"


def test_what_has_no_head_to_pool_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pooling: task=ner is no classification or regression; leave it null"):
        config(tmp_path, tmp_path, "task=ner", "pooling=mean")
    with pytest.raises(UserError, match=r"pooling: task=embedding is no classification or .*; set embedding\.pooling"):
        config(tmp_path, tmp_path, "task=embedding", "pooling=mean")
    with pytest.raises(UserError, match=r"head_epochs: task=retrieval has no head; leave it 0"):
        config(tmp_path, tmp_path, "task=retrieval", "head_epochs=1")
    with pytest.raises(UserError, match=r"lora\.rank: would leave new random weights as they are; leave reinit_layers"):
        config(tmp_path, tmp_path, "lora.rank=2", "reinit_layers=0")


@pytest.mark.parametrize(("pooling", "accuracy"), [("null", 0.5), ("mean", 1)])
def test_the_head_learns_first(
    pooling: str, accuracy: float, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings: of pooler and head, then of everything. The mean of frozen states tells both labels apart."""
    seen: list[tuple[set[int], float]] = []
    original = TaskTrainer.train

    def train(self: TaskTrainer, *rest: Any, **more: Any) -> Any:
        learning = {depth(name, 3) for name, one in self.model.named_parameters() if one.requires_grad}
        seen.append((learning, float(self.args.num_train_epochs)))
        return original(self, *rest, **more)

    monkeypatch.setattr(TaskTrainer, "train", train)
    own = [f"pooling={pooling}", "head_epochs=10", "epochs=1", "optim.lr=1e-9", "optim.head_lr=0.03"]
    assert finetune(config(folder, model, *own))["accuracy"] >= accuracy
    assert seen == [({4}, 10.0), ({0, 1, 2, 3, 4}, 1.0)]


def test_layers_that_begin_anew(tmp_path: Path, model: Path) -> None:
    loaded = load_model(config(tmp_path, model), AutoModelForSequenceClassification, ["x", "y"])
    before = {name: value.clone() for name, value in loaded.named_parameters()}
    torch.manual_seed(5)
    reinitialize(loaded, 1, 3)
    changed = {depth(name, 3) for name, value in loaded.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {3, 4}, "the highest of three layers, and the pooler"
    assert torch.equal(loaded.classifier.weight, before["classifier.weight"]), "which is new as it is"
    reinitialize(loaded, 0, 3)
    spread = float(loaded.bert.pooler.dense.weight.detach().std())
    assert np.isclose(spread, loaded.config.initializer_range, rtol=0.2)
    with pytest.raises(UserError, match=r"reinit_layers=4: the model has 3 layers"):
        reinitialize(loaded, 4, 3)


@pytest.mark.slow
def test_a_head_upon_the_mean_as_onnx(folder: Path, model: Path) -> None:
    finetune(config(folder, model, "pooling=mean", "epochs=9"))
    (folder / "in.txt").write_text("\n".join(TEXTS))
    assert compress.main([f"{folder}/out", f"{folder}/onnx", "--max-loss", "1"]) == 0
    for name in ("out", "onnx"):
        given = [f"in={folder}/in.txt", f"out={folder}/{name}.jsonl", "probabilities=true"]
        assert predict.main([f"model={folder}/{name}", *given]) == 0
    plain, onnx = ([*map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())] for name in ("out", "onnx"))
    for one, other in zip(plain, onnx, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
