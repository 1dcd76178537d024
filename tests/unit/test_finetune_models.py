"""Models as users have them: their names, tokenizers, positions and dropout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
)

from cloze import cli
from cloze.errors import UserError
from finetune.__main__ import finetune
from finetune.config import FinetuneConfig
from finetune.models import load_encoder_tokenizer
from finetune.probe import fill_masks, mean_states
from finetune.rates import settled, tell_rate
from tests.unit.tiny_bert import config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\n" + "good film\tx\nbad film\ty\n" * 8)
    return tmp_path


def renamed(model: Path, out: Path, old: str, new: str) -> Path:
    shutil.copytree(model, out)
    weights = load_file(model / "model.safetensors")
    save_file(
        {name.replace(old, new): value for name, value in weights.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


def first_weights(out: Path) -> torch.Tensor:
    return (
        AutoModelForSequenceClassification.from_pretrained(out).bert.encoder.layer[0].output.LayerNorm.weight.detach()
    )


def test_an_encoder_of_other_names_is_refused(folder: Path, model: Path) -> None:
    other = renamed(model, folder / "other", "bert.encoder", "bert.stack")
    line = r"model=.*other: has no bert\.encoder\.layer\.0\.\S+, nor \d+ other weights of the encoder.*init=random"
    with pytest.raises(UserError, match=line):
        finetune(config(folder, other))
    finetune(config(folder, other, "init=random", "epochs=1"))


@pytest.mark.slow
def test_older_ways_to_write_a_bert(folder: Path, model: Path) -> None:
    """LayerNorm's old names, a body without prefix, and PyTorch's own file: the same weights are found in all."""
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith("LayerNorm.weight"):
            weights[name] = torch.full_like(weights[name], 1.5)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    gamma = renamed(model, folder / "gamma", "LayerNorm.weight", "LayerNorm.gamma")
    renamed(gamma, folder / "both", "LayerNorm.bias", "LayerNorm.beta")
    renamed(model, folder / "body", "bert.", "")
    shutil.copytree(model, folder / "bin")
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    for name in ("both", "body", "bin"):
        finetune(config(folder, folder / name, "epochs=1", "optim.lr=1e-9", f"out={folder}/out-{name}"))
        assert float((first_weights(folder / f"out-{name}") - 1.5).abs().max()) < 1e-3, name


def test_r_drop_needs_dropout(folder: Path, model: Path) -> None:
    shutil.copytree(model, folder / "dry")
    described = json.loads((folder / "dry" / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "dry" / "config.json").write_text(json.dumps({**described, **none}))
    with pytest.raises(UserError, match=r"loss\.r_drop: the model has no dropout, .*; set dropout=0\.1"):
        finetune(config(folder, folder / "dry", "loss.r_drop=1"))
    with pytest.raises(UserError, match=r"loss\.r_drop"):
        finetune(config(folder, model, "loss.r_drop=1", "dropout=0"))
    finetune(config(folder, folder / "dry", "loss.r_drop=1", "dropout=0.3", "epochs=1"))
    written = json.loads((folder / "out" / "config.json").read_text())
    assert (written["hidden_dropout_prob"], written["attention_probs_dropout_prob"]) == (0.3, 0.3)


def test_lengths_that_the_model_does_not_have(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny one has 64 positions, and was pretrained on 32 tokens."""
    shutil.copytree(model, folder / "short")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder / "short")
    finetune(config(folder, folder / "short", "max_len=1024", "epochs=1"))
    told = capsys.readouterr().err
    assert "max_len=1024: " in told
    assert "has positions for 64 tokens: so many are used" in told
    assert "its tokenizer is made for 32 tokens, which is what pretraining saw" in told
    assert json.loads((folder / "out" / "metrics.json").read_text())["config"]["max_len"] == 64
    assert AutoTokenizer.from_pretrained(folder / "out").model_max_length == 64
    finetune(config(folder, folder / "short", "max_len=16", "epochs=1", f"out={folder}/b"))
    assert "max_len" not in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(folder / "b").model_max_length == 16


def write_tiny_roberta(folder: Path, positions: int) -> Path:
    """A byte-level tokenizer and an encoder whose positions begin behind the padding's."""
    folder.mkdir()
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["ann met bob in rome"] * 9, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    raw.model.save(str(folder))
    RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=raw.get_vocab_size(), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=positions, pad_token_id=1, bos_token_id=0, eos_token_id=2,
            type_vocab_size=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_tokenizer_of_roberta_s_kind(tmp_path: Path) -> None:
    """Words are cut as in a text, and 66 positions hold 64 tokens."""
    roberta = write_tiny_roberta(tmp_path / "roberta", 66)
    for name in ("train.conll", "dev.conll"):
        (tmp_path / name).write_text(("ann\tB-PER\nmet\tO\nrome\tB-LOC\n" + "in\tO\n" * 90 + "\n") * 8)
    settings = config(tmp_path, roberta, "task=ner", "epochs=20", "batch_size=2", "max_len=100", suffix="conll")
    tokenizer = load_encoder_tokenizer(settings, split_into_words=True)
    words = tokenizer(["ann", "rome"], is_split_into_words=True).input_ids
    assert words == AutoTokenizer.from_pretrained(roberta)(" ann rome").input_ids
    assert finetune(settings)["f1"] > 0.8
    body = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert body["config"]["max_len"] == 64


def test_a_tokenizer_in_roberta_s_older_files(tmp_path: Path) -> None:
    """vocab.json and merges.txt alone, as its first directories have it."""
    roberta = write_tiny_roberta(tmp_path / "roberta", 66)
    expected = AutoTokenizer.from_pretrained(roberta)("ann met rome").input_ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (roberta / name).unlink()
    assert load_encoder_tokenizer(config(tmp_path, roberta))("ann met rome").input_ids == expected


def test_a_long_text_of_roberta_s_is_cut_to_its_positions(tmp_path: Path) -> None:
    roberta = write_tiny_roberta(tmp_path / "roberta", 66)
    ((best,),) = fill_masks(roberta, ["ann <mask> " + "in " * 90], top=2)
    assert len(best) == 2
    assert mean_states(roberta, ["ann " + "in " * 90]).shape == (1, 32)


@pytest.mark.parametrize(
    ("layers", "width", "own", "rate"),
    [
        (2, 128, (), 3e-4), (4, 256, (), 3e-4), (4, 512, (), 1e-4), (8, 512, (), 1e-4), (12, 384, (), 1e-4),
        (12, 768, (), 5e-5), (24, 1024, (), 2e-5), (12, 768, ("lora.rank=8",), 5e-4),
        (2, 128, ("optim.lr=1e-5",), 1e-5), (24, 1024, ("optim.lr=1e-5", "lora.rank=8"), 1e-5),
    ],
)  # fmt: skip
def test_a_rate_by_the_size_of_the_model(
    layers: int, width: int, own: tuple[str, ...], rate: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published models from BERT-tiny to BERT-large; what is given wins."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 512}))
    asked = cli.compose("finetune", FinetuneConfig, [f"model={tmp_path}", "out=o", *own])
    assert settled(asked).optim.lr == pytest.approx(rate)
    tell_rate(asked, settled(asked))
    millions = 12 * layers * width**2 / 1e6
    told = f"the default, by the model's size ({millions:.1f} million weights in its layers)"
    lora = " and LoRA" if own else ""
    given = any("lr" in one for one in own)
    assert capsys.readouterr().err == f"optim.lr={rate:g}: {'as given' if given else told + lora}\n"
