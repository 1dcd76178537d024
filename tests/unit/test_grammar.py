"""Minimal pairs and pseudo-perplexity: the readers, scores against one masked position at a time, and what is told."""

import copy
import functools
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from cloze.corpus.manifest import read_manifest, val_split
from cloze.corpus.shards import Split
from cloze.corpus.tokenizer import load_tokenizer
from cloze.errors import UserError
from pretrain import grammar
from pretrain.config import Attention
from pretrain.data.loader import MicroBatch
from pretrain.evaluate import held_out_text, minimal_pairs
from pretrain.evaluate.frequencies import log_likelihoods, token_counts
from pretrain.evaluate.pair_files import Pair, Paradigm, read_paradigms
from pretrain.evaluate.pll import UNIT, Encoded, Metric, Scorer, encode
from pretrain.export.hugging_face import load_packed
from pretrain.model.bert import PackedBert
from tests.support import make_corpus
from tests.unit.tiny_bert import WORDS, write_tiny_bert

PIECES = [*WORDS, "##ed", "##ing", ".", "'"]
MASK = 4


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of large weights: fresh ones would predict nearly the same everywhere."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("grammar") / "model", words=PIECES)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 8 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@functools.cache
def scorer_of(folder: Path, kernel: Attention = Attention.sdpa, row_tokens: int = 100) -> tuple[Scorer, Any]:
    module, tokenizer = load_packed(folder, kernel)
    return scorer(lambda batch: module(batch)[0], row_tokens), tokenizer


def scorer(logits_of: Callable[[MicroBatch], torch.Tensor], row_tokens: int = 100, **options: Any) -> Scorer:
    cpu = torch.device("cpu")
    return Scorer(
        logits_of=logits_of, mask_id=MASK, max_positions=64, row_tokens=row_tokens, device=cpu,
        **options,
    )  # fmt: skip


def slowly(model: Any, text: Encoded, metric: Metric) -> float:
    """One masked position at a time, without packing."""
    total = 0.0
    for position, word in enumerate(text.words_T.tolist()):
        if word < 0:
            continue
        ids = torch.tensor(text.ids_T)[None]
        ids[0, position] = MASK
        if metric is Metric.within_word_l2r:
            for later in range(position + 1, len(text.ids_T)):
                if text.words_T[later] == word:
                    ids[0, later] = MASK
        with torch.no_grad():
            logits = model(ids).logits[0, position]
        total += float(logits.float().log_softmax(-1)[text.ids_T[position]])
    return total


# Scores

TEXTS = st.lists(
    st.sampled_from(["good", "goods", "filmed", "met", "bading", "annsed", "it's.", "?"]), min_size=1, max_size=8
)


@settings(max_examples=10, deadline=None)
@given(texts=st.lists(TEXTS.map(" ".join), min_size=1, max_size=4), row_tokens=st.integers(1, 200))
def test_scores_are_those_of_one_masked_position_at_a_time(model: Path, texts: list[str], row_tokens: int) -> None:
    packed, tokenizer = scorer_of(model, row_tokens=row_tokens)
    encoded = encode(tokenizer.backend_tokenizer, texts)
    assert [text.ids_T.tolist() for text in encoded] == tokenizer(texts)["input_ids"]
    plain = AutoModelForMaskedLM.from_pretrained(model).eval()
    found = packed.score([encoded], list(Metric)) * UNIT
    expected = [[slowly(plain, text, metric) for metric in Metric] for text in encoded]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_later_pieces_of_a_word_are_hidden_and_make_a_difference(model: Path) -> None:
    packed, tokenizer = scorer_of(model)
    one, several = encode(tokenizer.backend_tokenizer, ["good film .", "filmsed"])
    assert several.words_T.tolist() == [-1, 0, 0, 0, -1]
    scores = packed.score([[one], [several]], list(Metric))
    assert scores[0, 0] == scores[0, 1]
    assert abs(scores[1, 0] - scores[1, 1]) * UNIT > 1e-3


def test_modernbert_is_scored_too(tmp_path: Path, model: Path) -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(PIECES) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=64, local_attention=4, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2,
        sep_token_id=3,
    )  # fmt: skip
    plain = ModernBertForMaskedLM(config).eval()
    module = PackedBert.of(copy.deepcopy(plain), Attention.sdpa)
    packed = scorer(lambda batch: module(batch)[0])
    encoded = encode(load_tokenizer(model).backend, ["good films met a bading film . " * 3])
    found = packed.score([encoded], list(Metric)) * UNIT
    np.testing.assert_allclose(found[0], [slowly(plain, encoded[0], metric) for metric in Metric], atol=1e-4)


class OneOf:
    """A rank of a world that is not there: `add` gives back its own share."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def add(self, values: Sequence[float]) -> list[float]:
        return list(values)


@pytest.mark.parametrize("row_tokens", [20, 60, 10_000])
def test_ranks_share_the_rows_and_their_sums_are_the_same_to_the_bit(model: Path, row_tokens: int) -> None:
    module, tokenizer = load_packed(model, Attention.cpu)
    texts = encode(tokenizer.backend_tokenizer, ["goods met a film", "good met films", "bad", "rome was filmed"])
    units = [texts[:2], texts[2:]]

    def run(batch: MicroBatch) -> torch.Tensor:
        return module(batch)[0]

    alone = scorer(run, row_tokens).score(units, list(Metric))
    for world_size in (2, 3):
        ticks: list[list[int]] = [[] for _ in range(world_size)]
        shares = [
            scorer(run, row_tokens, process=OneOf(rank, world_size), tick=functools.partial(ticks[rank].append, rank))
            for rank in range(world_size)
        ]
        total = sum(one.score(units, list(Metric)) for one in shares)
        assert (total == alone).all()
        assert len({len(each) for each in ticks}) == 1, "under ZeRO 3 every rank runs equally often"


def test_a_row_that_two_sentences_share_is_run_once(model: Path) -> None:
    seen = []
    module, tokenizer = load_packed(model, Attention.sdpa)
    packed = scorer(lambda batch: (seen.append(len(batch.cu_seqlens) - 1), module(batch)[0])[1], 10_000)
    pair = encode(tokenizer.backend_tokenizer, ["ann met bob", "ann was bob"])
    scores = packed.score([pair], list(Metric))
    assert seen == [5]  # three a sentence, of which "ann [MASK] bob" is of both
    assert (scores[:, 0] == scores[:, 1]).all()


# Readers

BLIMP = {"sentence_good": "He met her.", "sentence_bad": "He meet her.", "field": "syntax/semantics",
         "linguistics_term": "subject_verb_agreement", "UID": "verbs_1"}  # fmt: skip
SLING = {"sentence_good": "好", "sentence_bad": "坏", "phenomenon": "Aspect", "paradigm": "zai_guo", "field": "syntax"}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def named(paradigm: Paradigm) -> tuple[str, str, str, list[tuple[str, str]]]:
    return (*paradigm[:3], [pair[:2] for pair in paradigm.pairs])


def test_every_layout_is_read(tmp_path: Path) -> None:
    a = [("He met her.", "He meet her.")]
    paths = {
        write(tmp_path / "x.jsonl", BLIMP): ("verbs_1", "subject_verb_agreement", "syntax_semantics", a),
        write(tmp_path / "s.jsonl", SLING): ("zai_guo", "Aspect", "syntax", [("好", "坏")]),
        write(tmp_path / "agreement_noun-in_1.txt", "bad .", "good .", "b .", "g ."): (
            "agreement_noun-in_1", "agreement_noun", "", [("good .", "bad ."), ("g .", "b .")],
        ),
        write(tmp_path / "sling.txt", "好@@@坏", "左@@@右"): ("sling", "", "", [("好", "坏"), ("左", "右")]),
        write(tmp_path / "two.tsv", "g\tb", "", "h\tc"): ("two", "", "", [("g", "b"), ("h", "c")]),
        write(tmp_path / "tabs.txt", "g\tb"): ("tabs", "", "", [("g", "b")]),
        write(tmp_path / "more.tsv", "UID\tsentence_bad\tsentence_good", "u\tb\tg"): ("u", "", "", [("g", "b")]),
        write(tmp_path / "c.csv", "sentence_good,sentence_bad", '"g, h",b'): ("c", "", "", [("g, h", "b")]),
    }  # fmt: skip
    for path, expected in paths.items():
        (found,) = read_paradigms([str(path)])
        assert named(found) == expected
    (found,) = read_paradigms([str(tmp_path / "agreement_noun-in_1.txt")], bad_first=False)
    assert found.pairs[0][:2] == ("bad .", "good .")
    assert found.pairs[1].place.endswith("agreement_noun-in_1.txt: line 3")
    write(tmp_path / "README.txt", "nothing to see")
    assert [one.name for one in read_paradigms([str(tmp_path)])] == [
        one.name for path in sorted(paths) for one in read_paradigms([str(path)])
    ]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("data/x.jsonl", "\ufeff" + json.dumps(BLIMP) + "\r\n")
        archive.writestr("data/.hidden.jsonl", "{")
    assert [named(one) for one in read_paradigms([str(tmp_path / "all.zip")])] == [paths[tmp_path / "x.jsonl"]]


def test_pairs_are_taken_from_all_over_a_paradigm(tmp_path: Path) -> None:
    path = write(tmp_path / "p.tsv", *(f"g{i}\tb{i}" for i in range(10)))
    found = [[pair.good for pair in read_paradigms([str(path)], most=most)[0].pairs] for most in (4, 10, 11)]
    assert found == [["g0", "g2", "g5", "g7"], [f"g{i}" for i in range(10)], [f"g{i}" for i in range(10)]]


BAD_FILES = {
    "odd.txt": ("a", "b", "c", r"line 3: an odd number of lines"),
    "hole.txt": ("a", "", "c", "d", r"line 2: its sentence_good is empty"),
    "side.tsv": ("a\tb", "a\t", r"line 2: its sentence_bad is empty"),
    "three.tsv": ("a\tb", "a\tb\tc", r"line 2: 3 columns, not 2"),
    "head.tsv": ("sentence_good\tother", "a\tb", r"line 1: no sentence_bad; it has sentence_good, other"),
    "sling.txt": ("a@@@b", "ab", r"line 2: 1 columns, not 2"),
    "keys.jsonl": (BLIMP, {"good": "a", "bad": "b"}, r"line 2: no sentence_good and no sentence_bad; it has good, bad"),
    "type.jsonl": ({**BLIMP, "sentence_bad": 3}, r"line 1: its sentence_bad is 3"),
    "void.jsonl": ({**BLIMP, "sentence_good": " "}, r"line 1: its sentence_good is"),
    "cut.jsonl": (BLIMP, '{"sentence_good": "a', r"line 2: not JSON"),
    "list.jsonl": ("[1]", r"line 1: not a JSON object"),
    "empty.jsonl": ("", r"holds no minimal pairs"),
    "x.parquet": ("", r"holds no minimal pairs; they are read from"),
    "broken.zip": ("no archive", r"cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    *lines, message = BAD_FILES[name]
    path = write(tmp_path / name, *lines)
    with pytest.raises(UserError, match=message) as error:
        read_paradigms([str(path)])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes("a\tb\né\tc\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.tsv: line 2: not UTF-8"):
        read_paradigms([str(tmp_path / "latin.tsv")])
    with pytest.raises(UserError, match=r"eval\.grammar=.*no such file"):
        read_paradigms([str(tmp_path / "none.tsv")], key="eval.grammar")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no minimal pairs"):
        read_paradigms([str(tmp_path / "folder")])


def test_sentences_that_the_model_cannot_take(model: Path) -> None:
    backend = load_tokenizer(model).backend
    long, void = Pair("good " * 70, "bad", "f: line 7"), Pair("good", "\u200b", "f: line 8")
    with pytest.raises(UserError, match="f: line 7: 72 tokens, and the model has 64 positions"):
        minimal_pairs.encode_pairs([Paradigm("p", "", "", [long])], backend, 64)
    with pytest.raises(UserError, match="f: line 8: the tokenizer leaves nothing"):
        minimal_pairs.encode_pairs([Paradigm("p", "", "", [void])], backend, 64)


# Accuracies


def pair_set(backend: Tokenizer, *sizes: int) -> minimal_pairs.PairSet:
    """Paradigms of so many pairs; the second sentence is a token longer in every other one."""
    paradigms = [
        Paradigm(
            f"p{i}", "noun_agreement" if i % 2 else "", "f", [Pair("good film", f"bad film{' a' * (j % 2)}", "")] * 1
        )
        for i, size in enumerate(sizes)
        for j in range(size)
    ]
    merged: dict[str, Paradigm] = {}
    for one in paradigms:
        merged.setdefault(one.name, one._replace(pairs=[])).pairs.extend(one.pairs)
    return minimal_pairs.encode_pairs(list(merged.values()), backend, 64)


def test_means_and_standard_errors(model: Path) -> None:
    pairs = pair_set(load_tokenizer(model).backend, 4, 2)
    scores = np.asarray([[2, 1], [1, 2], [3, 1], [5, 5], [1, 2], [math.nan, 1]], float)
    frequencies = np.asarray([[1, 2]] * 5 + [[2, 1]], float)
    columns = minimal_pairs.columns_of(pairs, {Metric.original: scores}, frequencies)
    assert columns["original"].tolist() == [1, 0, 1, 0.5, 0, 0.5]
    assert columns["original_per_token"].tolist() == [1, 0, 1, 1, 0, 0.5]  # 5/2 against 5/3
    assert columns["equal_length"].tolist()[::2] == [1, 1, 0]
    assert np.isnan(columns["equal_length"][1::2]).all()
    found = minimal_pairs.summary(pairs, columns)
    first, second = found["paradigms"]["p0"]["original"], found["paradigms"]["p1"]["original"]
    assert first.value == 0.625
    assert first.standard_error == pytest.approx(np.std([1, 0, 1, 0.5]) / 2)
    assert second.value == 0.25
    overall = found["groups"]["all"]["original"]
    assert overall.value == (0.625 + 0.25) / 2
    assert overall.standard_error == pytest.approx(abs(0.625 - 0.25) / 2)
    assert overall.sampling_error == pytest.approx(math.hypot(first.standard_error, second.standard_error) / 2)
    assert found["groups"]["agreement"]["original"] == second
    assert found["phenomena"].keys() == {"noun_agreement"}
    assert found["paradigms"]["p0"]["gain"].value == 0.625
    assert found["paradigms"]["p1"]["gain"].value == 0.25 - 0.5
    heading = minimal_pairs.table(found, [Metric.original])
    assert re.search(r"^all +6 +43\.8 ± 18\.[78] +25\.0 ± 25\.0 ", heading[1])
    told = minimal_pairs.headline(found, Metric.original)
    assert told["grammar_accuracy"] == overall.value
    assert told["grammar_agreement_gain"] == -0.25
    assert told["grammar/noun_agreement"] == 0.25


def test_a_binomial_standard_error_and_a_control_of_half(model: Path) -> None:
    """A model that is always right, with shuffled labels, is right half of the time."""
    pairs = pair_set(load_tokenizer(model).backend, 1000)
    columns = minimal_pairs.columns_of(pairs, {Metric.original: np.asarray([[1.0, 0.0]] * 1000)}, None)
    found = minimal_pairs.summary(pairs, columns)["groups"]["all"]
    assert found["original"] == (1, 0, 0)
    control = found["shuffled_labels"]
    assert control.standard_error == pytest.approx(math.sqrt(control.value * (1 - control.value) / 1000))
    assert abs(control.value - 0.5) < 3 * control.standard_error
    assert "frequencies" not in found
    assert "gain" not in found


def test_what_is_the_same_to_the_tokenizer_ties(model: Path) -> None:
    pairs = [Pair("zebra met bob", "yak met bob", ""), Pair("bob met ann", "ann met bob", "")]
    encoded = minimal_pairs.encode_pairs([Paradigm("p", "", "", pairs)], load_tokenizer(model).backend, 64)
    assert encoded.same_P.tolist() == [True, False]
    assert minimal_pairs.preferred(encoded, np.asarray([[1.0, 2.0], [1.0, 2.0]])).tolist() == [0.5, 0]
    counts_V = np.arange(len(PIECES) + 5)
    by_frequency = minimal_pairs.frequency_scores(encoded, counts_V)
    assert minimal_pairs.preferred(encoded, by_frequency).tolist() == [0.5, 0.5]  # the same words, in another order
    assert encoded.unknown_share(1) == 2 / 12


# Frequencies


def test_counts_are_those_of_the_first_pass(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(corpus)
    tokens = Split(corpus, manifest, "pass-00").gather(np.arange(300), 0).tokens_T.tolist()
    expected = Counter(tokens)
    counts_V = token_counts(corpus, manifest)
    assert counts_V.tolist() == [0 if token in (0, 2, 3, 4) else expected[token] for token in range(61)]
    assert (token_counts(str(corpus), manifest) == counts_V).all(), "by URL"
    monkeypatch.setattr("pretrain.evaluate.frequencies._RUN_SAMPLES", 10)
    monkeypatch.setattr("pretrain.evaluate.frequencies._COUNTED_TOKENS", manifest.splits["pass-00"].tokens // 3)
    some_V = token_counts(corpus, manifest)
    assert 0.25 < some_V.sum() / counts_V.sum() < 0.45
    text = Encoded(np.asarray([2, 10, 11, 10, 3]), np.asarray([-1, 0, 1, 2, -1]), 5)
    probabilities = (counts_V + 1) / (counts_V.sum() + 61)
    by_hand = 2 * math.log(probabilities[10]) + math.log(probabilities[11])
    assert log_likelihoods(counts_V, [text])[0] * UNIT == pytest.approx(by_hand)


# The command


def texts_of(folder: Path) -> Path:
    return write(folder / "held.txt", "good films met a bad film .", "", "good " * 100, "rome")


def test_pseudo_perplexity_of_lines(tmp_path: Path, model: Path) -> None:
    packed, tokenizer = scorer_of(model)
    backend = tokenizer.backend_tokenizer
    texts = held_out_text.lines_of(str(texts_of(tmp_path)), backend, most=0, max_positions=64)
    assert [len(text.ids_T) for text in texts] == [10, 64, 40, 3], "what is longer than the model is cut"
    assert sum(text.num_scored for text in texts) == 8 + 100 + 1
    scores = packed.score([[text] for text in texts[::3]], [Metric.original])[:, 0]
    found = held_out_text.perplexity(texts[::3], scores)
    plain = AutoModelForMaskedLM.from_pretrained(model).eval()
    nats = -sum(slowly(plain, text, Metric.original) for text in texts[::3])
    assert (found.texts, found.tokens, found.words) == (2, 9, 8)
    assert found.per_token == pytest.approx(math.exp(nats / 9), rel=1e-4)
    assert found.per_word == pytest.approx(math.exp(nats / 8), rel=1e-4)
    with pytest.raises(UserError, match=r"text=.*none\.txt: cannot be read"):
        held_out_text.lines_of(str(tmp_path / "none.txt"), backend, most=0, max_positions=64)
    with pytest.raises(UserError, match="holds no text"):
        held_out_text.lines_of(str(write(tmp_path / "void.txt", "", " ")), backend, most=0, max_positions=64)


def test_samples_of_a_split_keep_their_segments(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    continues_V = np.asarray([token % 2 == 1 for token in range(61)])
    found = held_out_text.samples_of(corpus, manifest, "val", continues_V=continues_V, most=5)
    assert len(found) == 5
    for text in found:
        assert text.ids_T[text.first - 1] == 3
        assert (text.words_T >= 0).tolist() == [token not in (0, 2, 3) for token in text.ids_T.tolist()]
        for before, here, token in zip(text.words_T, text.words_T[1:], text.ids_T[1:], strict=False):
            if here >= 0 and before >= 0:
                assert (here == before) == bool(continues_V[token])
    with pytest.raises(UserError, match=r"split=val-news: .* has no such samples; there are pass-00, val"):
        held_out_text.samples_of(corpus, manifest, val_split("news"), continues_V=continues_V, most=5)


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(corpus, model) of one tokenizer, and pairs.tsv beside the model."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "corpus").mkdir()
    make_corpus(folder / "corpus", samples=40, val=5, shards_per_split=1)
    vocabulary = (folder / "corpus" / "tokenizer" / "vocab.txt").read_text().split("\n")[5:-1]
    write_tiny_bert(folder / "model", words=vocabulary)
    write(folder / "word_agreement-1.tsv", "abc a.\tba c", "cab\tbac", "a b\ta b c")
    return folder / "corpus", folder / "model"


def test_the_command_prints_and_writes_all_of_it(
    letters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, model = letters
    data = model.parent / "word_agreement-1.tsv"
    held = write(tmp_path / "held.txt", "abc", "cab b")
    given = [
        f"model={model}",
        f"data=[{data}]",
        f"corpus={corpus}",
        f"text=[{held}]",
        "split=val",
        f"out={tmp_path}/o/o.json",
    ]
    assert grammar.main(given) == 0
    out = capsys.readouterr().out
    for expected in ("frequencies", "agreement", "word_agreement-1", "control, labels shuffled", "3 pairs in", "33%"):
        assert expected.replace("33%", "are [UNK]") in out
    body = json.loads((tmp_path / "o" / "o.json").read_text())
    row = body["minimal_pairs"]["paradigms"]["word_agreement-1"]
    assert row["pairs"] == 3
    assert row["gain"]["value"] == pytest.approx(row["within_word_l2r"]["value"] - row["frequencies"]["value"])
    perplexities = body["pseudo_perplexity"]
    assert perplexities[str(held)]["original"]["tokens"] == 7
    assert perplexities[f"{corpus} val"]["frequencies"]["texts"] == 5
    assert grammar.main(given) == 0, "its own file is replaced"
    (tmp_path / "o" / "o.json").write_text("{}")
    assert grammar.main(given) == 64
    assert "not one that Cloze wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=M"], "nothing to score"),
        (["model=M", "data=[D]", "pairs=-1"], "pairs=-1: cannot be negative"),
        (["model=M", "text=[D]", "split=val"], "split=val: of which corpus"),
        (["model=M", "data=[D]", "corpus=OTHER"], "was prepared with another tokenizer"),
        (["model=OTHER/tokenizer", "data=[D]"], "neither a run directory nor a whole checkpoint"),
        (["model=HEADLESS", "data=[D]"], "as predicting words needs"),
        (
            ["model=KIND", "data=[D]"],
            "its model_type is distilbert; there are bert, modernbert, roberta, camembert, xlm-roberta",
        ),
    ],
)
def test_mistakes_of_the_command(
    letters: tuple[Path, Path], corpus: Path, tmp_path: Path, overrides: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, model = letters
    for name, change in (("headless", {"architectures": ["BertModel"]}), ("kind", {"model_type": "distilbert"})):
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        configuration = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(configuration | change))
    weights = load_file(model / "model.safetensors")
    body = {key: value for key, value in weights.items() if not key.startswith("cls.")}
    save_file(body, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    make_corpus(tmp_path / "other", samples=20, vocab_size=40, val=0, shards_per_split=1)
    places = {"M": model, "D": model.parent / "word_agreement-1.tsv", "OTHER": tmp_path / "other",
              "HEADLESS": tmp_path / "headless", "KIND": tmp_path / "kind"}  # fmt: skip
    filled = [re.sub(r"\b[A-Z]+\b", lambda found: str(places[found[0]]), one) for one in overrides]
    assert grammar.main(filled) == 64
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


# minicons, where it is installed


def test_scores_are_those_of_minicons(model: Path) -> None:
    scorers = pytest.importorskip("minicons.scorer")
    packed, tokenizer = scorer_of(model)
    tokenizer.batch_encode_plus = tokenizer.__call__  # it is gone from transformers 5, and minicons calls it
    texts = ["good films met a bading film .", "rome", "annsed met bob's film"]
    theirs = scorers.MaskedLMScorer(AutoModelForMaskedLM.from_pretrained(model), "cpu", tokenizer=tokenizer)
    ours = packed.score([encode(tokenizer.backend_tokenizer, texts)], list(Metric)) * UNIT
    for number, metric in enumerate(Metric):
        expected = theirs.sequence_score(texts, reduction=lambda each: each.sum().item(), PLL_metric=metric.value)
        np.testing.assert_allclose(ours[:, number], expected, atol=1e-3)
