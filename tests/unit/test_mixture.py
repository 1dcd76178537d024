"""Mixtures: which corpus a position is dealt to, against a slow loop; packed rows against samples read one by one."""

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze import cli
from cloze.errors import UserError
from pretrain.config import TrainConfig
from pretrain.curves import Curve
from pretrain.data.live_masks import LiveMasks
from pretrain.data.loader import Layout, MicroBatch, MicroBatches, Streaming, TrainingCorpus, pack
from pretrain.data.mixture import BLOCK, MixedCorpus, MixtureOrder
from pretrain.data.stream import Window
from pretrain.mixture import Part, Weights, parse_mixture
from tests.support import make_corpus
from tests.unit.test_order import slow_sample_at

ONE = Curve(((0.0, 1.0),))


def constant(*values: float) -> Weights:
    return Weights(tuple(Curve(((0.0, value),)) for value in values), (1,) * len(values), ONE)


def slow_deal(weights: Weights, seed: int, total: int, size: int, blocks: int, lanes: int = 1) -> list[tuple[int, int]]:
    """(corpus, position in it) of the first positions, block by block of each lane."""
    found, counts = {}, [[0] * len(weights.shares(0.0)) for _ in range(lanes)]
    for block in range(blocks):
        part = 0 if weights.is_constant else min(4095, int((block + 0.5) * (size * lanes / total) * 4096))
        shares = weights.shares(0.0 if weights.is_constant else (part + 0.5) / 4096)
        for lane in range(lanes):
            left = (block * 0x9E3779B9 + lane * (2**32 // lanes)) % 2**32
            edges, sum_so_far = [0], 0.0
            for share in shares:
                sum_so_far += share
                edges.append((round(sum_so_far * 2**32) * size + left) >> 32)
            edges[-1] = size
            for turn in range(size):
                place = slow_sample_at(seed ^ 0x6D1C5, block * lanes + lane, turn, size)
                corpus = next(c for c in range(len(shares)) if place < edges[c + 1])
                found[(block * size + turn) * lanes + lane] = (corpus, counts[lane][corpus] * lanes + lane)
                counts[lane][corpus] += 1
    return [found[position] for position in range(len(found))]


CURVED = Weights((Curve(((0.0, 0.9), (1.0, 0.1))), Curve(((0.0, 0.0), (0.5, 0.0), (1.0, 3.0))), ONE), (1, 1, 1), ONE)
BY_SIZE = Weights((), (1000, 10, 200), Curve(((0.0, 0.7), (0.5, 0.7), (0.5, 0.3))))


@pytest.mark.parametrize("weights", [CURVED, BY_SIZE])
@pytest.mark.parametrize(("total", "lanes", "size"), [(96, 1, 16), (1_000, 1, 16), (40_000, 1, 32), (600_000, 5, 64)])
def test_the_order_is_a_slow_loops(weights: Weights, total: int, lanes: int, size: int) -> None:
    order = MixtureOrder(weights, 5, total, lanes)
    expected = slow_deal(weights, 5, total, size, blocks=min(8, total // size // lanes), lanes=lanes)
    corpora, own = order.deal(np.arange(len(expected)))
    assert list(zip(corpora.tolist(), own.tolist(), strict=True)) == expected


@settings(max_examples=12)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any), st.integers(0, 2**40), st.integers(0, 9))
def test_each_corpus_is_read_in_its_own_order_and_to_its_share(values: list[int], start: int, seed: int) -> None:
    order, count = MixtureOrder(constant(*values), seed, 1), len(values)
    start %= 40 * BLOCK
    before = order.counts(start)
    corpora, own = order.deal(np.arange(start, start + 3_000))
    for corpus in range(count):
        mine = own[corpora == corpus].tolist()
        assert mine == list(range(before[corpus], before[corpus] + len(mine)))
    assert sum(before) == start
    whole = order.counts(start // BLOCK * BLOCK)
    shares = np.array(values) / sum(values)
    assert np.abs(np.array(whole) - shares * (start // BLOCK * BLOCK)).max() < 4  # evens out over the blocks
    assert all(count == 0 for count, value in zip(before, values, strict=True) if value == 0)


def test_far_positions_are_looked_up_not_counted_up_to() -> None:
    """And are what they are when one has come there step by step."""
    far = 3_000 * BLOCK + 77
    near, direct = MixtureOrder(constant(2, 1), 3, 1), MixtureOrder(constant(2, 1), 3, 1)
    for block in (0, 5, 700):
        near.deal(np.array([block * BLOCK]))
    assert [part.tolist() for part in near.deal(np.array([far]))] == [
        part.tolist() for part in direct.deal(np.array([far]))
    ]
    assert sum(direct.counts(far)) == far


@pytest.mark.parametrize("weights", [constant(5, 4, 1), CURVED])
@pytest.mark.parametrize("lanes", [3, 8])
def test_in_lanes_each_reads_its_own_of_every_corpus(weights: Weights, lanes: int) -> None:
    """Without a gap, to its share, and looked up as it is counted; all together read each corpus' samples once."""
    total = 20_000
    order = MixtureOrder(weights, 7, total, lanes)
    corpora, own = order.deal(np.arange(total))
    for corpus in range(3):
        turns = []
        for lane in range(lanes):
            mine = own[lane::lanes][corpora[lane::lanes] == corpus]
            assert mine.tolist() == list(range(lane, lane + lanes * len(mine), lanes))
            turns.append(len(mine))
        assert max(turns) - min(turns) < 150  # so far apart do lanes stand in the midst of a block
        share = np.mean([weights.shares((i + 0.5) / 1_000)[corpus] for i in range(1_000)])
        assert sum(turns) / total == pytest.approx(share, abs=0.02)
    for start in (0, 1, lanes, 12_345):
        before = order.counts(start)
        assert before == np.bincount(corpora[:start], minlength=3).tolist()
        again = MixtureOrder(weights, 7, total, lanes).deal(np.arange(start, start + 50))
        assert [part.tolist() for part in again] == [
            corpora[start : start + 50].tolist(),
            own[start : start + 50].tolist(),
        ]


def test_behind_its_end_a_mixture_goes_on_as_it_ended() -> None:
    order = MixtureOrder(CURVED, 1, 96)
    corpora, _ = order.deal(np.arange(10_000, 20_000))
    assert np.bincount(corpora) / 10_000 == pytest.approx(CURVED.shares(1.0), abs=0.01)


def test_weights_by_size() -> None:
    sizes = np.array([1000.0, 10.0, 200.0])
    for share, power in ((0.2, 0.7), (0.5, 0.3), (1.0, 0.3)):
        assert BY_SIZE.shares(share) == pytest.approx((sizes**power / (sizes**power).sum()).tolist())
    assert Weights((), (3, 1), ONE).shares(0.0) == [0.75, 0.25]


# Corpora


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Three that fit each other, of different sizes, passes and lengths; of the last masks are all drawn live."""
    root = tmp_path_factory.mktemp("mixture")
    make_corpus(root / "en", samples=60, val=5, seed=1, baked_draws=1)
    make_corpus(root / "de", samples=20, val=3, seed=2, passes=2, baked_draws=2, named_val={"news": 4})
    make_corpus(root / "fr", samples=7, val=0, seed=3, max_len=16, baked_draws=0)
    return [root / name for name in ("en", "de", "fr")]


def mixed(folders: Sequence[Path], *weights: float, total: int = 400, lanes: int = 1) -> MixedCorpus:
    parts = [
        Part(path=str(folder), name=folder.name, weight=Curve(((0.0, weight),)))
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return MixedCorpus(parts, folders, ONE, 9, total, lanes)


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("live", [None, LiveMasks(Curve(((0.0, 0.4), (1.0, 0.1))), Curve(((0.0, 0.8),)), ONE, 300)])
def test_a_row_holds_the_samples_of_its_positions_one_after_another(
    folders: Sequence[Path], live: LiveMasks | None
) -> None:
    """Over many epochs of the small corpora, whose masks are those of the right draw: baked, or the same live."""
    if live:
        live = live._replace(random_share=Curve(((0.0, 0.1),)))
    corpus = mixed(folders, 0.5, 0.3, 0.2)
    corpus.mask_live(live)
    alone = [TrainingCorpus(folder) for folder in folders]
    for one in alone:
        one.mask_live(live)
    for start in (0, 130, 1_000):
        positions = np.arange(start, start + 50)
        parts = []
        for position, number, own in zip(positions.tolist(), *corpus.order.deal(positions), strict=True):
            parts += alone[number].training_parts(9, np.array([own]), np.array([position]))
        assert same(corpus.training_batch(9, positions), pack(parts))
    assert corpus.progress(1_000)["mixture/fr/epochs"] > 10


def test_with_one_weight_it_is_that_corpus(folders: Sequence[Path]) -> None:
    positions = np.arange(40, 90)
    corpus = mixed(folders, 0, 1, 0)
    assert same(corpus.training_batch(9, positions), TrainingCorpus(folders[1]).training_batch(9, positions))


def test_held_out_splits_bear_the_names_of_their_corpora(folders: Sequence[Path]) -> None:
    corpus = mixed(folders, 1, 1, 1)
    assert corpus.held_out == {"val-en": 5, "val-de": 3, "val-de-news": 4}
    assert corpus.averaged == ("val-en", "val-de")
    ours, theirs = corpus.val_batch(np.arange(4), "val-de-news"), TrainingCorpus(folders[1])
    assert same(ours, theirs.val_batch(np.arange(4), "val-news"))
    assert corpus.manifest.max_len == 24


def test_ranks_and_other_processes_see_the_same_order(folders: Sequence[Path]) -> None:
    corpus = mixed(folders, 2, 1, 1)

    def rows(ranks: int) -> list[list[int]]:
        every = [MicroBatches(corpus.opener, 9, Layout(rank, ranks, 4, 16), 32) for rank in range(ranks)]
        every = pickle.loads(pickle.dumps(every))
        found = []
        for step in range(3):
            for micro in range(16 // (4 * ranks)):
                for dataset in every:
                    batch = dataset[step * (16 // (4 * ranks)) + micro]
                    assert isinstance(batch, MicroBatch)
                    found.append(batch.input_ids_T[: batch.num_tokens].tolist())
        return found

    assert rows(1) == rows(2) == rows(4)


# Streamed


LANES, WINDOW = 4, 8


def streams(folders: Sequence[Path], rank: int, ranks: int, first: int = 0) -> MicroBatches:
    corpus = mixed(folders, 5, 3, 2, lanes=LANES)
    sources = Streaming([str(folder) for folder in folders], LANES, WINDOW)
    return MicroBatches(corpus.opener, 9, Layout(rank, ranks, 4, 16), first, sources)


def rows_of(batch: MicroBatch | UserError) -> list[tuple[int, ...]]:
    """What stands in the samples, masked, and behind it what is to be guessed: no two samples are alike."""
    assert isinstance(batch, MicroBatch)
    ends, answers = batch.cu_seqlens.tolist(), batch.mlm_labels_M[: batch.num_masked]
    index = batch.masked_index_M[: batch.num_masked]
    return [
        (*batch.input_ids_T[a:b].tolist(), *answers[(index >= a) & (index < b)].tolist()) for a, b in pairwise(ends)
    ]


def test_streamed_every_sample_once_an_epoch_masked_as_when_mapped(folders: Sequence[Path]) -> None:
    stream, whole = mixed(folders, 5, 3, 2, lanes=LANES), [TrainingCorpus(folder) for folder in folders]
    stream.stream(9, Streaming([str(folder) for folder in folders], LANES, WINDOW))
    pieces = [stream.order.deal(np.arange(i, i + 10)) for i in range(0, 400, 10)]
    dealt = [np.concatenate(part) for part in zip(*pieces, strict=True)]
    found = [row for i in range(0, 400, 10) for row in rows_of(stream.training_batch(9, np.arange(i, i + 10)))]
    for number, corpus in enumerate(whole):
        mine = [(own, row) for row, at, own in zip(found, *dealt, strict=True) if at == number]
        for begin in range(0, 400, sum(corpus.pass_sizes)):
            epochs = [row for own, row in mine if begin <= own < begin + sum(corpus.pass_sizes)]
            if len(epochs) == sum(corpus.pass_sizes):  # all passes, and all lanes of them
                expected = rows_of(corpus.training_batch(9, np.arange(begin, begin + sum(corpus.pass_sizes))))
                assert sorted(epochs) == sorted(expected)
        assert len(mine) > 60


@pytest.mark.parametrize("ranks", [2, 4])
def test_streamed_by_several_ranks_and_resumed_anywhere(folders: Sequence[Path], ranks: int) -> None:
    """The same global batches; and where the ranks divide the lanes, no window is read by two."""
    alone = streams(folders, 0, 1)
    steps = [sorted(row for micro in range(4) for row in rows_of(alone[4 * step + micro])) for step in range(20)]
    every = [streams(folders, rank, ranks, 16 * 5) for rank in range(ranks)]
    micros = 4 // ranks
    read: list[set[tuple[int, Window]]] = [set() for _ in every]
    for step in range(15):
        together = []
        for dataset, windows in zip(every, read, strict=True):
            for micro in range(micros):
                together += rows_of(dataset[micros * step + micro])
            assert dataset._corpus
            for number, corpus in enumerate(dataset._corpus.corpora):
                assert corpus._streamed
                windows |= {(number, window) for window in corpus._streamed._windows}
        assert sorted(together) == steps[5 + step]
    assert sum(map(len, read)) == len(set.union(*read))


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"vocab_size": 90}, "has another tokenizer than"), ({"objective": "none"}, "was prepared with objective=none")],
)
def test_what_does_not_fit(folders: Sequence[Path], tmp_path: Path, changes: dict[str, object], line: str) -> None:
    make_corpus(tmp_path / "other", samples=8, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=line):
        mixed([folders[0], tmp_path / "other"], 1, 1)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("shards/en", "is no list of corpora"),
        ([], "is no list of corpora"),
        ([{"weight": 1}], "has no path"),
        ([{"path": "a", "share": 1}], "a corpus has no share; there are path, weight, name"),
        ([{"path": "a"}, {"path": "x/a/"}], "two corpora are called a; give each a name"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "b has no weight, and others have one"),
        ([{"path": "a", "weight": -1}], ".a: the value -1 is not at least 0"),
        ([{"path": "a", "weight": 0}, {"path": "b", "weight": [[0, 1], [1, 0]]}], "all weights are 0 at 1 of the run"),
        ([{"path": "a", "name": "x/y"}], "has the name 'x/y', which is none for metrics"),
    ],
)
def test_what_is_no_mixture(value: object, line: str) -> None:
    with pytest.raises(UserError, match=f"^data.mixture.*{line}") as caught:
        parse_mixture(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["data.path=a"], "data.mixture: and data.path=a name corpora; leave one out"),
        (
            ["budget.hours=1", "data.temperature=[[0,1],[1,0.3]]"],
            "data.temperature: a curve stretches over the samples",
        ),
    ],
)
def test_what_a_mixture_does_not_go_with(given: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        cli.compose("train", TrainConfig, ["run=r", "data.mixture=[{path:b},{path:c}]", *given])
