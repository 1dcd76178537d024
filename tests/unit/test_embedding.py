"""Contrastive learning, its format and its scores: the loss is that of a loop, on any number of ranks; scores are
scikit-learn's; the directory gives the same vectors by sentence-transformers and by hand.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from cloze import cli
from cloze.errors import ExitCode, UserError
from finetune import retrieval
from finetune.__main__ import finetune
from finetune.config import EmbeddingsConfig
from finetune.embedder import load_embedder, pooling_of
from finetune.embeddings import main
from finetune.families.embedding import Finding
from finetune.techniques import contrastive
from pretrain.evaluate.frozen_config import Pooling
from pretrain.evaluate.states import encode, text_vectors
from tests.unit.tiny_bert import WORDS, config, write_tiny_bert

PLAIN = [word for word in WORDS if word.isalpha()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=1)


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(PLAIN, rng.integers(3, 8))) for _ in range(count)]


def loss_of_a_loop(anchors: Tensor, candidates: Tensor, texts: list[str], temperature: float) -> float:
    """`texts` are those of the candidates, of which the first belong to the anchors, in order."""
    losses = []
    for i, anchor in enumerate(anchors):
        scores = [float(torch.cosine_similarity(anchor, one, dim=0)) / temperature for one in candidates]
        kept = [score for j, score in enumerate(scores) if j == i or texts[j] != texts[i]]
        losses.append(math.log(sum(map(math.exp, kept))) - scores[i])
    return sum(losses) / len(losses)


IDS = [[2, 5, 3, 0], [2, 6, 3, 0], [2, 5, 6, 3], [2, 7, 3, 0], [2, 8, 3, 0], [2, 7, 3, 0], [2, 9, 3, 0], [2, 7, 8, 3],
       [2, 9, 9, 3]]  # fmt: skip


@pytest.mark.parametrize("num_groups", [2, 3])
def test_the_loss_is_that_of_a_loop(num_groups: int) -> None:
    """Of three anchors; two of the texts that belong to them are the same, and so is a hard negative's shape."""
    ids = torch.tensor(IDS[: 3 * num_groups])
    vectors = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    texts = [str(row) for row in ids[3:].tolist()]
    wanted = loss_of_a_loop(vectors[:3], vectors[3:], texts, 0.3)
    assert float(contrastive.batch_loss(vectors, ids, 0, 3, 0.3)) == pytest.approx(wanted, abs=1e-5)


def test_padding_makes_no_other_text() -> None:
    short, long = torch.tensor([[2, 5, 3]]), torch.tensor([[2, 5, 3, 0, 0], [2, 5, 0, 3, 0], [5, 2, 3, 0, 0]])
    (one,), (same, padded_within, other) = (contrastive.text_hashes(ids, 0).tolist() for ids in (short, long))
    assert one == same == padded_within
    assert one != other


def test_two_ranks_learn_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the ranks' gradients is that of all texts together, and each rank tells the same loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 9, (2, 6, 4), generator=generator)  # of two ranks: two anchors, theirs, two hard negatives
    vectors = torch.randn(2, 6, 8, generator=generator)

    def together(both: Tensor) -> Tensor:
        return torch.cat([both[:, 0:2].flatten(0, 1), both[:, 2:4].flatten(0, 1), both[:, 4:6].flatten(0, 1)])

    whole = vectors.clone().requires_grad_()
    wanted = contrastive.batch_loss(together(whole), together(ids), 0, 4, 0.1)
    wanted.backward()

    hashes = torch.stack([contrastive.text_hashes(one, 0) for one in ids])
    rank = SimpleNamespace(number=0, calls=0)

    def all_gather(gathered: list[Tensor], own: Tensor) -> None:
        part = slice(2 * (rank.calls % 3), 2 * (rank.calls % 3) + 2)
        source = vectors if own.is_floating_point() else hashes
        assert torch.equal(source[rank.number][part], own)
        for number in range(2):
            gathered[number].copy_(source[number][part])
        rank.calls += 1

    for name, value in {"is_initialized": True, "get_world_size": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank.number)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    gradients = []
    for rank.number in range(2):
        own = vectors[rank.number].clone().requires_grad_()
        loss = contrastive.batch_loss(own, ids[rank.number], 0, 2, 0.1)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
        loss.backward()
        gradients.append(own.grad)
    # Each parameter's gradient is averaged over the ranks, of whose vectors each rank has its own.
    torch.testing.assert_close(torch.stack(gradients) / 2, whole.grad, atol=1e-6, rtol=1e-4)


gains = st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0]), min_size=2, max_size=15)


@settings(max_examples=60, deadline=None)
@given(gains, st.randoms(use_true_random=False), st.integers(1, 12))
def test_ndcg_is_that_of_scikit_learn(judged: list[float], rng: object, cut: int) -> None:
    if not any(judged):
        judged[0] = 1.0
    order = rng.sample(range(len(judged)), len(judged))  # type: ignore[attr-defined]
    scores = np.empty(len(judged))
    scores[order] = -np.arange(len(judged), dtype=float)
    found = retrieval.ndcg(np.asarray([[judged[place] for place in order]], np.float32), [judged], cut)
    assert found[0] == pytest.approx(ndcg_score([judged], [scores], k=cut), abs=1e-6)
    right = {place for place, gain in enumerate(judged) if gain > 0}
    wanted = len(right & {*order[:cut]}) / len(right)
    shown = np.asarray([[judged[place] for place in order]], np.float32)
    assert retrieval.recall(shown, [len(right)], cut)[0] == pytest.approx(wanted)


def test_search_is_a_sort() -> None:
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
    wanted = np.argsort(-(queries @ documents.T), axis=1, kind="stable")
    for top in (3, 30, 50):
        search = retrieval.Search(queries, top)
        for start in range(0, 30, 7):
            search.add(documents[start : start + 7])
        assert np.array_equal(search.places_QK, wanted[:, :top])


def test_a_text_finds_its_own_among_all_positives() -> None:
    pairs = [(f"anchor {i}", f"text {i}") for i in range(30)] + [("another", "text 3")]
    finding = Finding(pairs)
    assert len(finding.texts) == 61
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(61, 4)).astype(np.float32)
    by_text = dict(zip(finding.texts, vectors, strict=True))
    positives = [f"text {i}" for i in range(30)]
    ranks = []
    for anchor, right in pairs:
        order = sorted(positives, key=lambda text: -float(by_text[anchor] @ by_text[text]))
        ranks.append(order.index(right) + 1)
    found = finding.score(finding.answers(vectors))
    assert found["recall@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 31)
    assert found["recall@10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / 31)
    wanted = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / 31
    assert found["ndcg@10"] == pytest.approx(wanted)


def test_terms() -> None:
    assert retrieval.terms("The cat's 3 hats, BERT_base: 電車に乗るbus") == [
        *("the", "cat", "s", "3", "hats", "bert", "base", "電", "車", "に", "乗", "る", "bus"),
    ]


def write_beir(folder: Path) -> Path:
    """Each document is found by its first words."""
    (folder / "qrels").mkdir(parents=True)
    texts = list(dict.fromkeys(sentences(60, seed=3)))
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": texts[i]} for i in range(20)] + [{"_id": "unjudged", "text": "good"}]
    for name, objects in (("corpus", rows), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    judgements = "".join(f"q{i}\td{i}\t1\nq{i}\td{i + 20}\t0\n" for i in range(20))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return folder


def test_a_beir_directory_is_evaluated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_beir(tmp_path / "toy")
    data = retrieval.read_beir(folder)
    assert len(data.queries) == 20
    assert data.relevance[3] == {3: 1.0}
    (tmp_path / "sts.csv").write_text('good film,good film,5\n"bad, bad film",ann,0\n' * 4)
    given_ = [f"model={model}", f"retrieval=[{folder}]", f"sts=[{tmp_path}/sts.csv]", "bm25=false", "random_seeds=2"]
    assert main(given_) == ExitCode.OK
    text = capsys.readouterr().out
    assert "| sts.csv, 8 pairs | Spearman, % |" in text
    assert "| this model | 100.0 (100.0 to 100.0) |" in text
    assert f"| toy, {len(data.documents)} documents, 20 queries | ndcg@10, % | recall@1, %" in text
    assert "| this model | 100.0 (100.0 to 100.0) | 100.0" in text.split("| toy")[1], "a text finds itself"
    assert "| random weights | 100.0 ± 0.0 |" in text


def test_bm25_finds_what_has_the_words(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    data = retrieval.read_beir(write_beir(tmp_path / "toy"))
    found = retrieval.score(data, retrieval.search_bm25(data))
    assert found["recall@10"].mean() == 1
    unknown = retrieval.RetrievalSet(
        name="x", documents=["a film", "the king"], queries=["xyz", "king"], relevance=[{0: 1.0}, {1: 1.0}]
    )
    assert retrieval.search_bm25(unknown).tolist()[1][0] == 1


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "a"}\n{"_id": "d1"}\n',
            r"corpus.jsonl: line 2: _id and text are needed",
        ),
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n', r"line 2: an _id that was there"),
        ("corpus.jsonl", '{"_id": "d0", "text": " "}\n', r"line 1: an empty document"),
        ("corpus.jsonl", "", r"corpus.jsonl: is empty"),
        ("queries.jsonl", "no json\n", r"queries.jsonl: line 1: not JSON"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\n", r"test.tsv: line 2: 'q0\\td0': query-id"),
        ("qrels/test.tsv", "q0\td900\t1\n", r"test.tsv: line 1: no document has the _id d900"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0\n", r"holds no judgement above 0"),
    ],
)
def test_faults_of_a_beir_directory(name: str, text: str, line: str, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "toy")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=line):
        retrieval.read_beir(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match="no such file; BEIR's layout"):
        retrieval.read_beir(folder)


def write_pairs(folder: Path) -> None:
    """Texts that belong together begin with the same two words."""
    rows = [
        (text, " ".join([*text.split()[:2], "film"]), other)
        for text, other in zip(sentences(60), sentences(60, 1), strict=True)
    ]
    (folder / "train.tsv").write_text("anchor\tpositive\tnegative\n" + "".join("\t".join(row) + "\n" for row in rows))
    (folder / "dev.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(
        f"{a}\t{b}\t5\n{a}\t{c}\t1\n" for a, b, c in rows[:10]
    ))  # fmt: skip


@pytest.mark.parametrize("pooling", Pooling)
def test_the_directory_is_that_of_sentence_transformers(pooling: Pooling, model: Path, tmp_path: Path) -> None:
    """Loaded by hand as their documentation says, it gives the same vectors."""
    write_pairs(tmp_path)
    finetune(config(tmp_path, model, "task=embedding", f"embedding.pooling={pooling.value}", "max_len=24", "epochs=1"))
    out = tmp_path / "out"
    modules = json.loads((out / "modules.json").read_text())
    assert [(one["type"].rpartition(".")[2], one["path"]) for one in modules] == [
        ("Transformer", ""), ("Pooling", "1_Pooling"),
    ]  # fmt: skip
    told = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert told["word_embedding_dimension"] == 32
    assert told["pooling_mode_mean_tokens"] is (pooling is Pooling.mean)
    assert told["pooling_mode_cls_token"] is (pooling is Pooling.cls)
    length = json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert length == 24

    texts = ["good film", "the very bad film was " * 9, "ann"]
    encoder = AutoModel.from_pretrained(out).eval()
    encoded = AutoTokenizer.from_pretrained(out)(
        texts, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.inference_mode():
        states = encoder(**encoded).last_hidden_state
    mask = encoded.attention_mask[..., None]
    vectors = states[:, 0] if told["pooling_mode_cls_token"] else (states * mask).sum(1) / mask.sum(1)
    wanted = torch.nn.functional.normalize(vectors, dim=-1)
    loaded, found = load_embedder(out, 512)
    assert found is pooling
    np.testing.assert_allclose(text_vectors(loaded, encode(loaded, texts, ""), found), wanted, atol=1e-5)


def test_sentence_transformers_gives_the_same_vectors(model: Path, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers")
    write_pairs(tmp_path)
    finetune(config(tmp_path, model, "task=embedding", "epochs=1", "max_len=24"))
    texts = ["good film", "the very bad film was " * 9, "ann"]
    loaded, pooling = load_embedder(tmp_path / "out", 512)
    wanted = theirs.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(text_vectors(loaded, encode(loaded, texts, ""), pooling), wanted, atol=1e-5)


def test_pooling_of_others_directories(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    assert pooling_of(tmp_path) is None
    new = "sentence_transformers.sentence_transformer.modules.{}"  # as release 6 writes it
    kinds = ["sentence_transformers.base.modules.transformer.Transformer", new.format("pooling.Pooling")]

    def written(told: dict[str, object], *more: str) -> Path:
        modules = [{"idx": i, "path": "", "type": kind} for i, kind in enumerate([*kinds, *more])]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(told))
        return tmp_path

    assert pooling_of(written({"pooling_mode": "cls"}, new.format("normalize.Normalize"))) is Pooling.cls
    assert pooling_of(written({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})) is Pooling.mean
    with pytest.raises(UserError, match="its pooling is max_tokens; mean or cls is needed"):
        pooling_of(written({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="its modules are Transformer, Pooling, Dense"):
        pooling_of(written({"pooling_mode": "cls"}, "sentence_transformers.models.Dense"))


@pytest.mark.slow
def test_single_texts_and_retrieval(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(sentences(24)) + "\n")
    single = [f"data.train={tmp_path}/train.txt", "task=embedding", "epochs=1", f"out={tmp_path}/single"]
    assert {*finetune(config(tmp_path, model, *single))} == {"spearman", "pearson"}
    with pytest.raises(UserError, match=r"single texts are learned from two draws of dropout.*set dropout=0\.1"):
        finetune(config(tmp_path, model, *single, "dropout=0", f"out={tmp_path}/other"))
    pairs = [f"data.dev={tmp_path}/train.tsv", "task=retrieval", "data.columns=[anchor,positive]"]
    before = finetune(config(tmp_path, model, *pairs, f"out={tmp_path}/before", "optim.lr=1e-12", "epochs=1"))
    after = finetune(config(tmp_path, model, *pairs, f"out={tmp_path}/after", "epochs=4", "patience=2", "lora.rank=4"))
    assert after["ndcg@10"] > before["ndcg@10"] + 0.05
    assert pooling_of(tmp_path / "after") is Pooling.mean


def test_faults_of_the_data_are_one_line(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    for name, text, line in (
        ("train", "anchor\tpositive\n" + "good\t \n" * 3, r"train\.tsv: line 2: positive is empty or no text"),
        ("train", "a\tb\nx\ty\n", r"train\.tsv: line 2: the columns anchor, positive, negative or anchor, positive or"),
        ("dev", "sentence1\tsentence2\tscore\n" + "a\tb\thigh\n" * 3, r"dev\.tsv: line 2: score is 'high'; a number"),
        ("dev", "anchor\tpositive\na\tb\n", r"dev\.tsv: line 2: the columns sentence1, sentence2, score or .*anchor"),
    ):
        kept = (tmp_path / f"{name}.tsv").read_text()
        (tmp_path / f"{name}.tsv").write_text(text)
        with pytest.raises(UserError, match=line):
            finetune(config(tmp_path, model, "task=embedding"))
        (tmp_path / f"{name}.tsv").write_text(kept)
    with pytest.raises(UserError, match=r"embedding: task=sst2 makes no vectors"):
        config(tmp_path, model, "task=sst2", "embedding.pooling=cls")
    with pytest.raises(UserError, match=r"nothing to evaluate: name sts"):
        cli.compose("embeddings", EmbeddingsConfig, [f"model={model}"])
