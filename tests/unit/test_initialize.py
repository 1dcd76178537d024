"""`init_from`: what is taken from published encoders and from runs, what is new, and what is refused."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from cloze.corpus.tokenizer import CorpusTokenizer, load_tokenizer
from cloze.errors import UserError
from pretrain.config import Architecture, ModelConfig, MorePositions
from pretrain.model.bert import PackedBert
from pretrain.model.initialize import initialize
from tests.support import make_tokenizer
from tests.unit.test_model import VOCAB, make_batch, packed, padded, small

OTHERS = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")  # [PAD] is 1, as RoBERTa has it
WORDS = (*"abcdefgh", *(f"##{letter}" for letter in "abcdefgh"), *(f"[unused{i}]" for i in range(VOCAB - 21)))
BERT = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 40}
ROBERTA = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "max_position_embeddings": 42, "pad_token_id": 1}
MODERN = {"max_position_embeddings": 40, "pad_token_id": 1, "local_attention": 8, "global_rope_theta": 5000.0}
MODERN_EXTRA = {"local_attention": 8, "global_rope_theta": 5000.0}
KINDS: dict[str, tuple[Architecture, Any, Any, dict[str, Any]]] = {
    "bert": (Architecture.bert, BertForPreTraining, BertConfig, BERT),
    "bert-mlm": (Architecture.bert, BertForMaskedLM, BertConfig, BERT),
    "bert-bare": (Architecture.bert, BertModel, BertConfig, BERT),
    "roberta": (Architecture.roberta, RobertaForMaskedLM, RobertaConfig, ROBERTA),
    "roberta-bare": (Architecture.roberta, RobertaModel, RobertaConfig, ROBERTA),
    "camembert": (Architecture.roberta, CamembertForMaskedLM, CamembertConfig, ROBERTA),
    "xlm-roberta": (Architecture.xlm_roberta, XLMRobertaForMaskedLM, XLMRobertaConfig, ROBERTA),
    "modernbert": (Architecture.modernbert, ModernBertForMaskedLM, ModernBertConfig, MODERN),
    "modernbert-bare": (Architecture.modernbert, ModernBertModel, ModernBertConfig, MODERN),
}


def write_tokenizer(
    folder: Path, words: tuple[str, ...] = WORDS, specials: tuple[str, ...] = OTHERS
) -> CorpusTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*specials, *words]) + "\n")
    return load_tokenizer(folder)


def source_of(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """A Hugging Face directory of random weights, biases and norms too; its tokenizer is beside it as `tokenizer`."""
    _, model_class, config_class, own = KINDS[kind]
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64,
    }  # fmt: skip
    torch.manual_seed(5)
    model = model_class(config_class(**sizes | own | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "source")
    write_tokenizer(folder / "tokenizer")
    shutil.copytree(folder / "tokenizer", folder / "source", dirs_exist_ok=True)
    return folder / "source"


def model_of(kind: str, **changes: Any) -> ModelConfig:
    extra = MODERN_EXTRA if KINDS[kind][0] is Architecture.modernbert else None
    return small(**{"architecture": KINDS[kind][0], "extra": extra, **changes})


def fresh(source: Path, kind: str = "bert", **changes: Any) -> PackedBert:
    torch.manual_seed(6)
    return PackedBert(model_of(kind, **changes), load_tokenizer(source.parent / "tokenizer").facts, max_len=24)


def begun(source: Path, kind: str = "bert", **changes: Any) -> tuple[PackedBert, str]:
    """A model that goes on from `source`, and what was said of it."""
    module = fresh(source, kind, **changes)
    tokenizer = source.parent / "tokenizer"
    return module, initialize(module, str(source), load_tokenizer(tokenizer).facts, tokenizer)


def refusal(source: Path, kind: str = "bert", **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        begun(source, kind, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(source), "SOURCE")


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_logits_equal(module: PackedBert, source: Path, kind: str) -> None:
    """Of the packed model and Hugging Face's own, loaded by Hugging Face, on padded samples."""
    batch = make_batch(5, 6, max_len=24, objective="none")
    inputs = padded(batch)
    del inputs["next_sentence_label"], inputs["labels"]
    if KINDS[kind][0] is not Architecture.bert:
        del inputs["token_type_ids"]
    with torch.no_grad():
        theirs = KINDS[kind][1].from_pretrained(source).eval()(**inputs)
        ours = module.eval()(batch)[0]
    logits = theirs.prediction_logits if kind == "bert" else theirs.logits
    expected = logits[inputs["attention_mask"].bool()][batch.masked_index_M]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bare" not in kind])
def test_logits_are_the_sources(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path, kind)
    capfd.readouterr()
    module, said = begun(source, kind)
    assert capfd.readouterr().err == ""  # transformers says nothing
    new = ", new: cls.seq_relationship, which it has not, new: bert.pooler, which it has not"
    assert said == f"weights from {source}" + (new if kind == "bert-mlm" else "")
    assert_logits_equal(module, source, kind)


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        ("bert-bare", ", new: cls.predictions, which it has not, new: cls.seq_relationship, which it has not"),
        ("roberta-bare", ", new: lm_head, which it has not, without its roberta.pooler"),
        ("modernbert-bare", ", new: head, which it has not, new: decoder, which it has not"),
    ],
)
def test_an_encoder_alone_gets_new_heads(tmp_path: Path, kind: str, new: str) -> None:
    source = source_of(tmp_path, kind)
    before = weights_of(fresh(source, kind).hf)
    module, said = begun(source, kind)
    assert said == f"weights from {source}{new}"
    theirs, prefix = load_file(source / "model.safetensors"), f"{module.hf.base_model_prefix}."
    for name, weight in weights_of(module.hf).items():
        if name.startswith(prefix):
            given = theirs[name.removeprefix(prefix)]
            first = 2 if name.startswith("roberta.embeddings.position") else 0  # of rows that are never used
            assert torch.equal(weight[first : len(given)], given[first:]), name
        else:
            assert torch.equal(weight, before[name]), name


def test_a_head_for_another_task_is_left_out(tmp_path: Path) -> None:
    source = source_of(tmp_path, "roberta")
    model = RobertaForSequenceClassification.from_pretrained(source)
    model.save_pretrained(source)
    assert (
        begun(source, "roberta")[1] == f"weights from {source}, new: lm_head, which it has not, without its classifier"
    )


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As files of 2018 and 2019 have them, with the decoder's weights twice and a buffer."""
    found = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    found["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    return found | {"bert.embeddings.position_ids": torch.arange(40)[None]}


@pytest.mark.parametrize("file", ["sharded", "bin", "bin-sharded", "old", "half", "untied-twin"])
def test_every_file_format_gives_the_same_weights(tmp_path: Path, file: str) -> None:
    source = source_of(tmp_path)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"1-of-2": names[::2], "2-of-2": names[1::2]}
    if file in ("sharded", "bin-sharded"):
        suffix, save = ("safetensors", save_file) if file == "sharded" else ("bin", torch.save)
        stem = "model" if file == "sharded" else "pytorch_model"
        for part, inside in parts.items():
            save({name: weights[name] for name in inside}, source / f"{stem}-{part}.{suffix}")
        places = {name: f"{stem}-{part}.{suffix}" for part, inside in parts.items() for name in inside}
        (source / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    elif file == "untied-twin":  # both biases, as some versions wrote them
        save_file(weights | {"cls.predictions.decoder.bias": torch.zeros(VOCAB)}, source / "model.safetensors")
    elif file == "half":
        save_file({name: weight.to(torch.float64) for name, weight in weights.items()}, source / "model.safetensors")
    else:
        torch.save(old_names(weights) if file == "old" else weights, source / "pytorch_model.bin")
    found = weights_of(begun(source)[0].hf)
    for name, weight in weights.items():
        assert torch.equal(found[name][: len(weight)], weight), name


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_head_of_its_own_stays_one(tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path, kind, tie_word_embeddings=False)
    extra = {**(MODERN_EXTRA if kind == "modernbert" else {}), "tie_word_embeddings": False}
    assert_logits_equal(begun(source, kind, extra=extra)[0], source, kind)
    given = {key: str(value).lower() for key, value in extra.items()}
    asked = ",".join(f"{key}:{value}" for key, value in given.items())
    assert refusal(source, kind).endswith(f"is another model than this run's; add 'model.extra={{{asked}}}'")


@pytest.mark.parametrize(("theirs", "ours"), [(40, 64), (40, 24)])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_positions_that_both_have_are_taken(tmp_path: Path, kind: str, theirs: int, ours: int) -> None:
    before = 2 if kind == "roberta" else 0
    source = source_of(tmp_path, kind, max_position_embeddings=theirs + before)
    module = fresh(source, kind, max_positions=ours)
    name = module.blueprint.positions
    assert name
    fresh_ones, given = weights_of(module.hf)[name][before:], load_file(source / "model.safetensors")[name][before:]
    module, said = begun(source, kind, max_positions=ours)
    found = weights_of(module.hf)[name][before:]
    assert said.endswith(f", {min(theirs, ours)} of {ours} positions from it")
    assert torch.equal(found[:40], given[:ours])
    assert torch.equal(found[40:], fresh_ones[40:])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_more_positions_are_repeated_or_interpolated(tmp_path: Path, kind: str) -> None:
    before, ours = (2 if kind == "roberta" else 0), 100
    source, tokenizer = source_of(tmp_path, kind), tmp_path / "tokenizer"
    for way in (MorePositions.repeated, MorePositions.interpolated):
        module = fresh(source, kind, max_positions=ours)
        name = module.blueprint.positions
        assert name
        said = initialize(module, str(source), load_tokenizer(tokenizer).facts, tokenizer, (), way)
        assert said == f"weights from {source}, its 40 positions {way.value} to 100"
        found = weights_of(module.hf)[name][before:]
        given = load_file(source / "model.safetensors")[name][before:]
        for place in range(ours):
            low, part = divmod(place * 39 / 99, 1)
            between = given[int(low)] * (1 - part) + given[min(39, int(low) + 1)] * part
            expected = given[place % 40] if way is MorePositions.repeated else between
            torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-5)


# Words


def test_words_that_were_added_begin_as_the_mean_of_their_pieces(tmp_path: Path) -> None:
    """In places that were kept free, and behind the last; what has no pieces begins as the mean of all."""
    source = source_of(tmp_path)
    filled = {"[unused0]": "abc", "[unused3]": "##hg", "[unused4]": "12", "[unused5]": "a1b"}
    words = (*(filled.get(word, word) for word in WORDS), "cab")
    ours = write_tokenizer(tmp_path / "tokenizer", words)
    module, said = begun(source)
    assert said == (
        f"weights from {source}, 5 words added, each from the mean of its old pieces (1 that had none from the mean of "
        "all)"
    )
    given, found = load_file(source / "model.safetensors"), weights_of(module.hf)
    ids = {word: row for row, word in enumerate([*OTHERS, *WORDS])}
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        rows, old = found[name], given[name]
        for word, pieces in (("abc", "a ##b ##c"), ("##hg", "##h ##g"), ("cab", "c ##a ##b"), ("a1b", "a ##b")):
            expected = old[[ids[piece] for piece in pieces.split()]].mean(0)
            torch.testing.assert_close(rows[ours.vocabulary[word]], expected)
        torch.testing.assert_close(rows[ours.vocabulary["12"]], old[:VOCAB].mean(0))
        kept = [row for word, row in ids.items() if word not in filled]
        assert torch.equal(rows[kept], old[kept])


def test_another_tokenizer_is_refused_or_matched_by_text(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    assert "ids would mean other words; prepare with tokenizer.path=SOURCE, or add init_allow=[tokenizer]" in (
        refusal_with_other_words(source)
    )
    tokenizer = tmp_path / "tokenizer"
    ours = load_tokenizer(tokenizer)
    module, before = fresh(source), weights_of(fresh(source).hf)
    said = initialize(module, str(source), ours.facts, tokenizer, ["tokenizer"])
    assert said.endswith(", 14 of 16 tokens (88%) by their text, the others are fresh")
    name = "bert.embeddings.word_embeddings.weight"
    found, given = weights_of(module.hf)[name], load_file(source / "model.safetensors")[name]
    theirs = {word: row for row, word in enumerate([*OTHERS, *WORDS])}
    for word, row in ours.vocabulary.items():
        assert torch.equal(found[row], given[theirs[word]] if word in theirs else before[name][row]), word


def refusal_with_other_words(source: Path) -> str:
    write_tokenizer(source.parent / "tokenizer", (*"hgfedcba", "##h", "new", "##new"), OTHERS[::-1])
    return refusal(source)


# Refusals


def test_rotary_positions_may_turn_otherwise_where_that_is_allowed(tmp_path: Path) -> None:
    source = source_of(tmp_path, "modernbert")
    tokenizer, extra = tmp_path / "tokenizer", {**MODERN_EXTRA, "global_rope_theta": 7000.0}
    assert "global_rope_theta:5000.0" in refusal(source, "modernbert", extra=extra)
    facts = load_tokenizer(tokenizer).facts
    for given in (extra, {"local_attention": 8}):
        module = fresh(source, "modernbert", extra=given)
        assert initialize(module, str(source), facts, tokenizer, ["rope_theta"]) == f"weights from {source}"
    other = fresh(source, "modernbert", extra={**extra, "local_attention": 16})
    with pytest.raises(UserError, match=r"local_attention:8,global_rope_theta:7000.0"):
        initialize(other, str(source), facts, tokenizer, ["rope_theta"])


@pytest.mark.parametrize(
    ("kind", "given", "changes", "line"),
    [
        ("bert", {}, {"num_layers": 1}, "model.num_layers=2"),
        ("bert", {}, {"hidden_size": 64, "num_heads": 8}, "model.hidden_size=32 model.num_heads=4"),
        ("bert", {"layer_norm_eps": 1e-5}, {}, "'model.extra={layer_norm_eps:1e-05}'"),
        ("bert", {}, {"extra": {"hidden_act": "relu"}}, "model.extra=null"),
        ("roberta", {"type_vocab_size": 2}, {}, "'model.extra={type_vocab_size:2}'"),
        ("roberta", {}, {"architecture": Architecture.bert}, "model.architecture=roberta"),
        ("xlm-roberta", {}, {"architecture": Architecture.roberta}, "model.architecture=xlm_roberta"),
        ("modernbert", {}, {"extra": None}, "'model.extra={local_attention:8,global_rope_theta:5000.0}'"),
    ],
)
def test_another_model_is_told_with_what_to_add(
    tmp_path: Path, kind: str, given: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    said = refusal(source_of(tmp_path, kind, **given), kind, **changes)
    assert said == f"init_from=SOURCE: is another model than this run's; add {line}"


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("bert", {"model_type": "distilbert"}, "its model_type is 'distilbert'; there are bert, modernbert, roberta, "),
        ("bert", {"model_type": ["bert"]}, "its model_type is ['bert']; there are "),
        ("bert", {"position_embedding_type": "relative_key"}, "its position_embedding_type is relative_key; of bert"),
        ("bert", {"is_decoder": True}, "its is_decoder is True"),
        ("bert", {"hidden_size": "wide"}, "config.json: no configuration of bert"),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"]}, "its config.json has layer_types"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}},
            "its config.json has rope_parameters: scaling by dynamic",
        ),
    ],
)
def test_a_configuration_that_is_not_known_is_one_line(
    tmp_path: Path, kind: str, changes: dict[str, Any], line: str
) -> None:
    source = source_of(tmp_path, kind)
    body = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(body | changes))
    assert line in refusal(source, kind)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda name: name.replace("attention.self", "attention.inner"),
            "it has no bert.encoder.layer.0.attention.self",
        ),
        (
            lambda name: name.replace("transform", "transformation"),
            "it has no cls.predictions.transform.LayerNorm.bias",
        ),
        (lambda name: f"encoder_q.{name}", "it has no bert.embeddings.LayerNorm.bias (and 36 more)"),
    ],
)
def test_names_that_do_not_match_are_told(tmp_path: Path, change: Any, line: str) -> None:
    """Case 33: they were random weights, silently."""
    source = source_of(tmp_path)
    weights = load_file(source / "model.safetensors")
    save_file({change(name): weight for name, weight in weights.items()}, source / "model.safetensors")
    said = refusal(source)
    assert said.startswith("init_from=SOURCE: its names are not those of bert: ")
    assert line in said


def lying_header(offsets: tuple[int, int], shape: list[int]) -> bytes:
    header = json.dumps({"bert.pooler.dense.bias": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        lying_header((0, 4096), [1024]),
        lying_header((0, 64), [2**40]),
        lying_header((64, 0), [16]),
        lying_header((0, 64), [4, 3]),
    ],
)
def test_safetensors_that_lie_are_one_line(tmp_path: Path, data: bytes) -> None:
    source = source_of(tmp_path)
    (source / "model.safetensors").write_bytes(data)
    assert "init_from=SOURCE: its model.safetensors is no whole safetensors file (" in refusal(source)


class Hostile:
    """What a pickle may do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("code", "is damaged, or holds more than tensors, and is not read: a pickle may run code"),
        ("pickled", "is damaged, or holds more than tensors"),
        ("cut", "is damaged, or holds more than tensors"),
        ({"bert.pooler.dense.bias": 1}, "holds 'bert.pooler.dense.bias', which is no tensor"),
        ({"model": {"a": torch.zeros(1)}}, "holds 'model', which is no tensor"),
        ({1: torch.zeros(1)}, "holds 1, which is no tensor"),
        (torch.zeros(3), "holds no table of tensors"),
        ({}, "holds no table of tensors"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_not_read(tmp_path: Path, content: Any, line: str) -> None:
    source = source_of(tmp_path)
    (source / "model.safetensors").unlink()
    path, touched = source / "pytorch_model.bin", tmp_path / "touched"
    if content == "code":
        torch.save({"a": Hostile(touched)}, path)
    elif content == "pickled":
        path.write_bytes(pickle.dumps({"a": Hostile(touched)}))
    elif content == "cut":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        torch.save(content, path)
    assert f"init_from=SOURCE: its pytorch_model.bin {line}" in refusal(source)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "has no weight_map of plain file names"),
        ({"weight_map": ["a"]}, "has no weight_map of plain file names"),
        ([], "holds no JSON object"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "model-1.safetensors, of model.safetensors.index.json, is not"),
        (
            {"weight_map": {"a": "part.safetensors"}},
            "part.safetensors has no a, which model.safetensors.index.json says",
        ),
    ],
)
def test_an_index_that_lies_is_one_line(tmp_path: Path, index: Any, line: str) -> None:
    source = source_of(tmp_path)
    (source / "model.safetensors").rename(source / "part.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert line in refusal(source)


def test_ids_beyond_the_rows_are_one_line(tmp_path: Path) -> None:
    source = source_of(tmp_path, vocab_size=VOCAB - 1)
    assert refusal(source).endswith(
        "its bert.embeddings.word_embeddings.weight has 60 rows, its tokenizer ids up to 60; name an encoder with its "
        "own tokenizer"
    )


def test_a_shape_that_is_not_its_configurations_is_one_line(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    weights = load_file(source / "model.safetensors")
    for wrong in (torch.zeros(31), torch.zeros(32, dtype=torch.int64)):
        save_file(weights | {"bert.pooler.dense.bias": wrong}, source / "model.safetensors")
        assert "its bert.pooler.dense.bias is [3" in refusal(source)


@pytest.mark.parametrize(
    ("keep", "line"),
    [
        ("tokenizer", "neither a run, a checkpoint nor an encoder to be found"),
        ("model", "holds neither tokenizer.json nor vocab.txt"),
        ("config", "has no model.safetensors or pytorch_model.bin"),
    ],
)
def test_half_a_directory_is_one_line(tmp_path: Path, keep: str, line: str) -> None:
    source = source_of(tmp_path)
    for path in source.iterdir():
        kind = "tokenizer" if path.name == "vocab.txt" else "model" if path.suffix == ".safetensors" else "config"
        if kind != keep and not (keep == "model" and kind == "config"):
            path.unlink()
    assert line in refusal(source)


def test_whichever_file_of_the_tokenizer_there_is(tmp_path: Path) -> None:
    facts = make_tokenizer(tmp_path / "saved", VOCAB, 40)
    source = source_of(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "saved", tmp_path / "tokenizer")
    (source / "vocab.txt").unlink()
    shutil.copy(tmp_path / "saved" / "tokenizer.json", source)
    module = packed(replace(model_of("bert")))
    assert initialize(module, str(source), facts, tmp_path / "tokenizer") == f"weights from {source}"
