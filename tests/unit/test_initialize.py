"""`init_from`: what is taken from Hugging Face directories and from runs, what is new, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

from cloze.corpus.manifest import TokenizerFacts
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError
from pretrain.model.bert import PackedBert
from pretrain.model.initialize import initialize
from tests.support import make_tokenizer
from tests.unit.test_model import VOCAB, small


@pytest.fixture
def facts(tmp_path: Path) -> TokenizerFacts:
    return make_tokenizer(tmp_path / "tokenizer", VOCAB, 40)


def source_of(folder: Path, kind: type[Any] = BertForPreTraining, **changes: Any) -> Path:
    """A Hugging Face directory with the tokenizer in `folder`."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 40,
    }  # fmt: skip
    torch.manual_seed(5)
    kind(BertConfig(**sizes | changes)).save_pretrained(folder / "source")
    shutil.copytree(folder / "tokenizer", folder / "source", dirs_exist_ok=True)
    return folder / "source"


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def fresh(facts: TokenizerFacts, **changes: Any) -> PackedBert:
    torch.manual_seed(6)
    return PackedBert(small(**changes), facts, max_len=24)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_every_weight_comes_from_the_source(
    tmp_path: Path, facts: TokenizerFacts, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever of the tokenizer's files there is; without a word from transformers."""
    source = source_of(tmp_path)
    for other in {"tokenizer.json", "vocab.txt"} - {file}:
        (source / other).unlink(missing_ok=True)
    module = fresh(facts)
    before, theirs = weights_of(module.hf), weights_of(BertForPreTraining.from_pretrained(source))
    capfd.readouterr()
    assert initialize(module, str(source), facts) == f"weights from {source}"
    assert capfd.readouterr().err == ""
    for name, weight in weights_of(module.hf).items():
        assert torch.equal(weight[: len(theirs[name])], theirs[name]), name
        assert torch.equal(
            weight[len(theirs[name]) :], before[name][len(theirs[name]) :]
        )  # rows that pad the vocabulary


@pytest.mark.parametrize(("theirs", "ours"), [(40, 64), (40, 24)])
def test_positions_that_both_have_are_taken(tmp_path: Path, facts: TokenizerFacts, theirs: int, ours: int) -> None:
    source = source_of(tmp_path, max_position_embeddings=theirs)
    module = fresh(facts, max_positions=ours)
    before = weights_of(module.hf)["bert.embeddings.position_embeddings.weight"]
    assert initialize(module, str(source), facts).endswith(f", {min(theirs, ours)} of {ours} positions from it")
    found = weights_of(module.hf)["bert.embeddings.position_embeddings.weight"]
    given = weights_of(BertForPreTraining.from_pretrained(source))["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(found[:40], given[:ours])
    assert torch.equal(found[40:], before[40:])


def test_new_heads_are_named(tmp_path: Path, facts: TokenizerFacts) -> None:
    source = source_of(tmp_path, BertModel)
    said = initialize(fresh(facts), str(source), facts)
    assert said == (
        f"weights from {source}, new: cls.predictions, which it has not, new: cls.seq_relationship, which it has not"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_layers": 1}, r"has one more, bert\.encoder\.layer\.1\.attention"),
        ({"num_layers": 3}, r"has no bert\.encoder\.layer\.2\.attention"),
        ({"hidden_size": 64}, r"its bert\.embeddings\..* is \[61, 32\], this model's \[61, 64\]"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, facts: TokenizerFacts, changes: dict[str, Any], line: str) -> None:
    source = source_of(tmp_path)
    with pytest.raises(UserError, match=f"init_from={source}: {line}.*; choose the model options of the source$"):
        initialize(fresh(facts, **changes), str(source), facts)


def test_another_tokenizer_is_refused(tmp_path: Path, facts: TokenizerFacts) -> None:
    source = source_of(tmp_path)
    other = make_tokenizer(tmp_path / "other", VOCAB + 1, 40)
    assert load_tokenizer(source).facts.fingerprint == facts.fingerprint
    with pytest.raises(UserError, match=r"ids would mean other words; prepare with tokenizer\.path="):
        initialize(fresh(other), str(source), other)


@pytest.mark.parametrize(
    ("keep", "line"), [("tokenizer", "neither a run, a checkpoint nor"), ("model", "holds neither")]
)
def test_half_a_directory_is_one_line(tmp_path: Path, facts: TokenizerFacts, keep: str, line: str) -> None:
    source = source_of(tmp_path)
    for path in source.iterdir():
        if ("token" in path.name or path.name == "vocab.txt") != (keep == "tokenizer"):
            path.unlink()
    with pytest.raises(UserError, match=line) as caught:
        initialize(fresh(facts), str(source), facts)
    assert "\n" not in str(caught.value)
