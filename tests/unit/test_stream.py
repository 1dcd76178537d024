"""Streaming: every sample once an epoch, the same global batches for every world size, resume at any position."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloze import storage
from cloze.corpus.manifest import ShardEntry, read_manifest
from cloze.corpus.shards import CorruptShard
from cloze.errors import UserError
from pretrain.data.loader import Layout, MicroBatch, MicroBatches, Streaming, TrainingCorpus, training_steps
from pretrain.data.order import lane_bounds, window_order
from pretrain.data.stream import Row, Streamed, _Fetcher
from tests.support import make_corpus, served
from tests.unit.test_shards import LIES, contract, honest, listed, tar_of

SAMPLES, LANES, WINDOW, SEED = 331, 4, 16, 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "corpus"
    make_corpus(path, samples=SAMPLES, passes=2, shards_per_split=5)
    return path


def streamed(corpus: Path) -> Streamed:
    return Streamed(str(corpus), read_manifest(corpus), SEED, LANES, WINDOW)


def ids(stream: Streamed, first: int, count: int) -> list[int]:
    parts = [samples.ids_N for samples, _ in stream.gather(np.arange(first, first + count))]
    return [int(i) for i in np.concatenate(parts)]


def all_ids(corpus: Path, split: str) -> list[int]:
    return [(shard.id << 32) + i for shard in read_manifest(corpus).split_shards(split) for i in range(shard.samples)]


def slow_order(corpus: Path, epoch: int, shard_order: list[int]) -> list[int]:
    """One epoch's ids by the definition: concatenate, cut into lanes, shuffle windows, deal in turns."""
    shards = read_manifest(corpus).split_shards(f"pass-{epoch % 2:02d}")
    stream = [(shards[s].id << 32) + i for s in shard_order for i in range(shards[s].samples)]
    bounds = lane_bounds(len(stream), LANES).tolist()
    lanes = []
    for lane in range(LANES):
        stretch = stream[bounds[lane] : bounds[lane + 1]]
        shuffled = []
        for window, start in enumerate(range(0, len(stretch), WINDOW)):
            part = stretch[start : start + WINDOW]
            shuffled += [part[i] for i in window_order(SEED, epoch, lane, window, len(part)).tolist()]
        lanes.append(shuffled)
    return [lanes[q % LANES][q // LANES] for q in range(len(stream))]


def test_every_sample_once_an_epoch_and_pass_after_pass(corpus: Path) -> None:
    stream = streamed(corpus)
    for epoch in range(4):
        found = ids(stream, epoch * SAMPLES, SAMPLES)
        assert sorted(found) == all_ids(corpus, f"pass-{epoch % 2:02d}")
    assert ids(stream, 0, SAMPLES) != ids(stream, 2 * SAMPLES, SAMPLES)


def test_equals_the_definition(corpus: Path) -> None:
    found = ids(streamed(corpus), 0, SAMPLES)
    by_shard = [i >> 32 for i in found]
    shards = [shard.id for shard in read_manifest(corpus).split_shards("pass-00")]
    candidates = [list(order) for order in itertools.permutations(range(len(shards)))]
    assert len(set(by_shard)) == len(shards)
    assert found in [slow_order(corpus, 0, order) for order in candidates]


def test_any_position_first(corpus: Path) -> None:
    whole = ids(streamed(corpus), 0, 2 * SAMPLES)
    for start in (0, 1, 37, SAMPLES - 3, SAMPLES, SAMPLES + 200):
        assert ids(streamed(corpus), start, 25) == whole[start : start + 25]


def batches(corpus: Path, rank: int, world_size: int, micro: int, first: int = 0) -> Iterator[list[MicroBatch]]:
    layout = Layout(rank, world_size, micro, 16)
    dataset = MicroBatches(corpus, SEED, layout, first, Streaming((str(corpus),), LANES, WINDOW))
    return training_steps(dataset, steps=30, workers=0, prefetch=1, pin_memory=False)


def rows(step: list[MicroBatch]) -> list[tuple[int, ...]]:
    found = []
    for batch in step:
        ends = batch.cu_seqlens.tolist()
        found += [tuple(batch.input_ids_T[a:b].tolist()) for a, b in itertools.pairwise(ends)]
    return found


@pytest.mark.parametrize(("world_size", "micro"), [(2, 4), (4, 2), (2, 8), (8, 1)])
def test_global_batches_do_not_depend_on_the_layout(corpus: Path, world_size: int, micro: int) -> None:
    alone = [sorted(rows(step)) for step in batches(corpus, 0, 1, 16)]
    ranks = [list(batches(corpus, rank, world_size, micro)) for rank in range(world_size)]
    together = [sorted(row for rank in ranks for row in rows(rank[step])) for step in range(30)]
    assert together == alone


def test_masks_equal_the_mapped_reader(corpus: Path) -> None:
    mapped = TrainingCorpus(corpus)
    by_id = {}
    for positions in np.array_split(np.arange(2 * SAMPLES), 20):
        step = mapped.training_batch(SEED, positions)
        by_id.update(dict.fromkeys(rows([step])))
    stream = TrainingCorpus(corpus)
    stream.stream(SEED, Streaming((str(corpus),), LANES, WINDOW))
    for positions in np.array_split(np.arange(2 * SAMPLES), 20):
        assert all(row in by_id for row in rows([stream.training_batch(SEED, positions)]))


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", samples=100)
    shard = read_manifest(tmp_path / "c").shards[0]
    path = tmp_path / "c" / shard.split / shard.name
    data = bytearray(path.read_bytes())
    data[600] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="checksum"):
        ids(streamed(tmp_path / "c"), 0, 100)


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c", samples=100)
    shard = read_manifest(tmp_path / "c").shards[0]
    path = tmp_path / "c" / shard.split / shard.name
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError) as caught:
        ids(streamed(tmp_path / "c"), 0, 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_member_is_refused(tmp_path: Path, lie: str) -> None:
    """Though the manifest lists it, checksum and all: by the same reader as from the disk."""
    (tmp_path / "pass-00").mkdir()
    members = {name: payload for name, payload in (honest() | LIES[lie]).items() if payload is not None}
    entry = listed(tmp_path, tar_of(members))
    with pytest.raises(CorruptShard) as caught:
        _Fetcher(str(tmp_path), contract()).rows(entry, 0, 2)
    assert "\n" not in str(caught.value)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE_SECONDS", 0.001)


def over(url: str, corpus: Path, lanes: int = LANES, window: int = WINDOW) -> Streamed:
    return Streamed(url, read_manifest(corpus), SEED, lanes, window)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["drop", "503"])
def test_reads_over_http_whose_first_two_answers_are_faults(corpus: Path, fault: str) -> None:
    asked: Counter[str] = Counter()

    def twice(what: str) -> str | None:
        asked[what] += 1
        return fault if asked[what] <= 2 else None

    with served(corpus, fault=twice) as (url, _):
        assert ids(over(url, corpus), 0, SAMPLES) == ids(streamed(corpus), 0, SAMPLES)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["drop", "503", "gone", "no ranges"])
def test_what_cannot_be_read_is_one_line(corpus: Path, fault: str) -> None:
    words = "ignores byte ranges; set data.access=mapped" if fault == "no ranges" else "check the address"
    with served(corpus, ranges=fault != "no ranges", fault=lambda what: fault in ("drop", "503") and fault) as (url, _):
        stream = over(f"{url}/nowhere" if fault == "gone" else url, corpus)
        with pytest.raises(CorruptShard, match=words) as caught:
            ids(stream, 0, 10)
    assert "\n" not in str(caught.value)


def test_a_url_that_nobody_knows(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        over("nosuch://x", corpus)
    for command in (f"pipe:touch {tmp_path}/canary", f"pipe://touch {tmp_path}/canary"):
        with pytest.raises(UserError):
            ids(over(command, corpus), 0, 10)
    assert not (tmp_path / "canary").exists()


def test_windows_are_sent_for_together_and_ahead(corpus: Path) -> None:
    """Whoever asks for a batch of all lanes waits for one answer, not for one a lane; later ones are there already.

    So it is at the beginning of an epoch, too: nothing that its first batch needs is still to be asked for.
    """

    class Watched(_Fetcher):
        def rows(self, shard: ShardEntry, begin: int, end: int) -> list[Row]:
            meeting.wait(timeout=20)  # until as many are on their way as there are lanes
            return super().rows(shard, begin, end)

    meeting = threading.Barrier(16)
    stream = over(str(corpus), corpus, lanes=16, window=4)
    stream._fetcher = Watched(str(corpus), read_manifest(corpus))
    ids(stream, 0, 16)
    meeting.abort()
    stream._fetcher = _Fetcher(str(corpus), read_manifest(corpus))
    stream._windows.clear()
    stream._epochs.clear()
    for first in range(0, 2 * SAMPLES, 16):
        known = {*stream._windows}
        found = ids(stream, first, 16)
        needed, _ = stream._places(np.arange(first, first + 16))
        assert first == 0 or known.issuperset(needed)
        assert len(stream._windows) <= 4 * 16
        assert found == ids(over(str(corpus), corpus, lanes=16, window=4), first, 16)
