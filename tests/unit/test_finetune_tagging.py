"""Named entities: BIO and BIOES checked, the CRF against enumeration, whole entities against a slow reader."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cloze import cli
from cloze.errors import UserError
from finetune.__main__ import finetune
from finetune.config import FinetuneConfig
from finetune.data import Dataset
from finetune.families.tagging import Sentence, entities, entity_scores, load_tagger, prepare, sentences
from finetune.keys import DataConfig
from finetune.readers import Row
from finetune.tasks import IGNORED
from finetune.techniques.crf import Crf
from tests.unit.tiny_bert import config, write_tiny_bert

CONLL = "{}/train.conll"
DATA = cli.compose("finetune", FinetuneConfig, ["model=m", "out=o"]).data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"))


def data(**changes: object) -> DataConfig:
    return replace(DATA, **changes)


def checked(*tags: list[str], repair: bool = False) -> list[Sentence]:
    rows = [Row("line 1", {"words": own, "tags": own}) for own in tags]
    return sentences(Dataset(name="x", rows=rows), data(repair_tags=repair))


def crf_of(num_tags: int, seed: int) -> Crf:
    crf = Crf(num_tags)
    generator = torch.Generator().manual_seed(seed)
    for parameter in crf.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    return crf


def path_score(crf: Crf, emissions: torch.Tensor, tags: tuple[int, ...]) -> float:
    total = float(crf.start[tags[0]] + crf.end[tags[-1]])
    total += sum(float(emissions[t, tag]) for t, tag in enumerate(tags))
    return total + sum(float(crf.transitions[a, b]) for a, b in itertools.pairwise(tags))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_crf_against_every_path(seed: int, lengths: list[int]) -> None:
    """The likelihood and the best path of up to 3^4 enumerated ones; pieces without a word lie in between."""
    rng = np.random.default_rng(seed)
    crf, num_tags, width = crf_of(3, seed), 3, 9
    emissions = torch.randn(len(lengths), width, num_tags, generator=torch.Generator().manual_seed(seed))
    tags = torch.full((len(lengths), width), IGNORED)
    expected = 0.0
    for row, length in enumerate(lengths):
        places = np.sort(rng.choice(width, length, replace=False))
        own, gold = emissions[row, places], tuple(int(n) for n in rng.integers(0, num_tags, length))
        tags[row, places] = torch.tensor(gold)
        paths = {path: path_score(crf, own, path) for path in itertools.product(range(num_tags), repeat=length)}
        expected += np.logaddexp.reduce(list(paths.values())) - paths[gold]
        assert tuple(crf.best(own)) == max(paths, key=lambda path: paths[path])
    assert float(crf(emissions, tags)) == pytest.approx(expected / sum(lengths), rel=1e-4)


def spelled(spans: list[tuple[str, int]], closed: bool) -> list[str]:
    """Tags of entities, or O, of so many words, one after another."""
    tags = []
    for kind, length in spans:
        inside = [f"I-{kind}"] * (length - 2) + [f"{'E' if closed else 'I'}-{kind}"] * (length > 1)
        tags += ["O"] * length if kind == "O" else [f"{'S' if closed and length == 1 else 'B'}-{kind}", *inside]
    return tags


@given(st.lists(st.tuples(st.sampled_from(["O", "PER", "LOC"]), st.integers(1, 4)), max_size=6), st.booleans())
def test_entities_of_spelled_tags(spans: list[tuple[str, int]], closed: bool) -> None:
    starts = np.cumsum([0, *(length for _, length in spans)]).tolist()
    expected = {(kind, at, at + length) for (kind, length), at in zip(spans, starts, strict=False) if kind != "O"}
    tags = spelled(spans, closed)
    assert entities(tags) == expected
    if tags and "O" in tags:
        assert checked(tags, ["S-X" if closed else "B-X"])


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "I-Y", "B-Y"]), min_size=1), st.booleans())
def test_repaired_tags_are_sound_and_mean_what_they_meant(tags: list[str], closed: bool) -> None:
    tags = [*tags, "S-X"] if closed else tags
    repaired = checked(tags, repair=True)[0].tags
    assert entities(repaired) == entities(tags)
    assert checked(list(repaired))


def test_faulty_predictions_count_as_conll_counts_them() -> None:
    assert entities(["I-PER", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC"]) == {
        ("PER", 0, 2), ("LOC", 2, 3), ("LOC", 4, 5), ("LOC", 5, 6),
    }  # fmt: skip
    gold, guess = [["B-A", "I-A", "O"], ["B-A", "B-A"]], [["B-A", "O", "O"], ["B-A", "B-B"]]
    found = entity_scores(gold, guess)
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (1 / 3, 1 / 3, 1 / 3, 3 / 5)
    assert entity_scores([["O"]], [["O"]])["f1"] == 0


def conlleval(gold: list[str], guessed: list[str]) -> tuple[int, int, int]:
    """Right, found and true entities as CoNLL's script `conlleval` counts them: tag by tag, by what begins and ends."""

    def split(tag: str) -> tuple[str, str]:
        return (tag[0], tag[2:]) if tag != "O" else ("O", "")

    def ends(before: tuple[str, str], tag: tuple[str, str]) -> bool:
        pairs = {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O"), ("B", "S"), ("I", "S")}
        return before[0] in "ES" or (before[0], tag[0]) in pairs or (before[0] != "O" and before[1] != tag[1])

    def starts(before: tuple[str, str], tag: tuple[str, str]) -> bool:
        pairs = {("E", "E"), ("E", "I"), ("O", "E"), ("O", "I"), ("S", "E"), ("S", "I")}
        return tag[0] in "BS" or (before[0], tag[0]) in pairs or (tag[0] != "O" and before[1] != tag[1])

    right = found = true = 0
    inside = False
    was_g, was_p = ("O", ""), ("O", "")
    for g, p in itertools.zip_longest(map(split, [*gold, "O"]), map(split, [*guessed, "O"])):
        end_g, end_p = ends(was_g, g), ends(was_p, p)
        if inside and (end_g or end_p):
            right += end_g and end_p and was_g[1] == was_p[1]
            inside = False
        start_g, start_p = starts(was_g, g), starts(was_p, p)
        inside = inside or (start_g and start_p and g[1] == p[1])
        inside = inside and start_g == start_p
        true += start_g
        found += start_p
        was_g, was_p = g, p
    return right, found, true


TAGS = st.lists(st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in "XY")]), max_size=9)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=4))
def test_entity_scores_are_conlleval_s(pairs: list[tuple[list[str], list[str]]]) -> None:
    """Of any tags, faulty ones too, BIO and BIOES mixed."""
    gold, guessed = zip(*[(a[: len(b)], b[: len(a)]) for a, b in pairs], strict=True)
    right, found, true = map(sum, zip(*map(conlleval, gold, guessed), strict=True))
    if not any(gold):
        return
    scores = entity_scores(gold, guessed)
    assert scores["precision"] == pytest.approx(right / max(1, found))
    assert scores["recall"] == pytest.approx(right / max(1, true))
    assert scores["f1"] == pytest.approx(2 * right / max(1, found + true))


def write_conll(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = ["-DOCSTART- O", ""]
    for _ in range(count):
        for word in rng.choice(["ann", "bob", "rome", "the", "was", "films", "unknown"], rng.integers(3, 9)):
            lines.append(f"{word} {'B-PER' if word in ('ann', 'bob') else 'B-LOC' if word == 'rome' else 'O'}")
            if word == "rome":
                lines.append("films I-LOC")
        lines.append("")
    path.write_text("\n".join(lines))


def test_the_first_piece_of_a_word_alone_bears_its_tag(tmp_path: Path, model: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.conll").write_text("rome B-LOC\nfilms I-LOC\nwas O\n")
    (feature,) = prepare(config(tmp_path, model, "task=ner", suffix="conll")).train
    pieces = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(feature["input_ids"])
    assert [piece[:2] for piece in pieces].count("##") == 1
    tagged = [piece for piece, label in zip(pieces, feature["labels"], strict=True) if label != IGNORED]
    assert tagged == [piece for piece in pieces if not piece.startswith(("##", "["))]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "crf"])
def test_learns_entities(head: str, tmp_path: Path, model: Path) -> None:
    """`films` is two pieces, and an entity only after `rome`; max_len cuts words off, which are then missed."""
    write_conll(tmp_path / "train.conll", 120, 1)
    write_conll(tmp_path / "dev.conll", 40, 2)
    own = ["task=ner", f"head={head}", "epochs=6"]
    result = finetune(config(tmp_path, model, *own, suffix="conll"))
    assert result["f1"] > 0.85
    tagger, tokenizer = load_tagger(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = tokenizer([["ann", "was", "rome", "films"]], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        first_pieces = tagger.eval()(**encoded).logits[0, [1, 2, 3, 4]]
    tags = tagger.crf.best(first_pieces) if head == "crf" else first_pieces.argmax(-1).tolist()
    assert [tagger.config.id2label[tag] for tag in tags] == ["B-PER", "O", "B-LOC", "I-LOC"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["head"] == head
    if head == "linear":
        cut = finetune(config(tmp_path, model, *own, "max_len=5", f"out={tmp_path}/cut", suffix="conll"))
        assert cut["recall"] < 0.8 < cut["precision"]


@pytest.mark.slow
def test_a_crf_learns_at_a_rate_of_its_own(tmp_path: Path, model: Path) -> None:
    """At the defaults I-LOC becomes likelier after B-LOC than after O; at the encoder's rate, 1e-5, it would not."""
    write_conll(tmp_path / "train.conll", 120, 1)
    write_conll(tmp_path / "dev.conll", 10, 2)
    finetune(config(tmp_path, model, "task=ner", "head=crf", "optim.lr=1e-5", suffix="conll"))
    tagger = load_tagger(tmp_path / "out")
    ids = tagger.config.label2id
    moves = tagger.crf.transitions[:, ids["I-LOC"]].detach()
    assert float(moves[ids["B-LOC"]] - moves[ids["O"]]) > 0.02
    # fine-tuned again, it begins with what it has
    finetune(
        config(
            tmp_path, tmp_path / "out", "task=ner", "head=crf", "optim.crf_lr=1e-9", f"out={tmp_path}/b", suffix="conll"
        )
    )
    again = load_tagger(tmp_path / "b").crf.transitions[:, ids["I-LOC"]].detach()
    assert torch.allclose(again, moves, atol=1e-5)


def test_rows_that_have_no_tags(tmp_path: Path, model: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"tokens": ["a"], "marks": ["O"]}\n')
    source = f"'hub:{tmp_path}/hub:train'"
    with pytest.raises(UserError, match=r"row 0: lists of words .* are needed, there are tokens, marks"):
        finetune(config(tmp_path, model, "task=ner", f"data.train={source}", f"data.dev={source}"))


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("a\tO\nb\tI-PER\n", r"line 2: I-PER after O: an entity begins with B-PER"),
        ("a\tB-PER\nb\tI-LOC\n", r"line 2: I-LOC after B-PER: an entity begins with B-LOC"),
        ("a\tO\n\nx\tI-PER\n", r"line 3: I-PER after O"),
        ("a\tPERSON\n", r"line 1: tag 'PERSON': O, or one of B-TYPE, I-TYPE is needed"),
        ("a\tS-PER\nb\tB-PER\nc\tO\n", r"line 3: B-PER is not followed by I-PER or E-PER"),
        ("a\tS-PER\nb\tI-PER\n", r"line 2: I-PER after S-PER: an entity begins with B-PER or S-PER"),
        ("a\tS-PER\nb\tB-PER\n", r"line 3: B-PER is not followed"),
        ("a\tO\nb\n", r"line 2: 'b': a word and its tag are needed"),
        ("a\tO\n", r"every label is 'O'"),
        ("\n\n", r"holds no examples"),
    ],
)
def test_faulty_files_are_named_by_line(lines: str, fault: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "train.conll").write_text(lines)
    (tmp_path / "dev.conll").write_text("a\tB-PER\nb\tO\n")
    with pytest.raises(UserError, match=rf"data\.train=.*train\.conll: {fault}"):
        finetune(config(tmp_path, model, "task=ner", suffix="conll"))


def test_dev_tags_that_training_lacks(tmp_path: Path, model: Path) -> None:
    (tmp_path / "train.conll").write_text("a\tB-PER\nb\tO\n")
    (tmp_path / "dev.conll").write_text("a\tB-LOC\nb\tO\n")
    with pytest.raises(UserError, match=r"dev\.conll: line 1: label 'B-LOC' is not in data\.train, which"):
        finetune(config(tmp_path, model, "task=ner", suffix="conll"))
