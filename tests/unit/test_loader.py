"""Micro-batches: packing against a slow loop, epochs, baked and live masks, and errors out of worker processes."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze.cli import compose
from cloze.corpus.manifest import read_manifest, write_manifest
from cloze.corpus.masking import Masks, Unmasked, draw_masks
from cloze.corpus.shards import CorruptShard, Samples, sample_ids
from cloze.errors import UserError
from pretrain.config import TrainConfig
from pretrain.curves import Curve
from pretrain.data.live_masks import LiveMasks, check_masking, live_masks
from pretrain.data.loader import (
    IGNORED,
    Layout,
    MicroBatch,
    MicroBatches,
    TrainingCorpus,
    bounded,
    pack,
    training_steps,
)
from pretrain.data.order import locate
from tests.support import default_masking, make_corpus, random_block, tokenizer_facts


def random_part(rng: random.Random, samples: int, objective: str) -> tuple[Samples, Masks]:
    block = random_block(rng, samples=samples, max_len=15, vocab_size=99, objective=objective)
    ids = sample_ids(rng.randrange(9), rng.randrange(9), samples)
    vocabulary = tokenizer_facts(99).mask_vocabulary
    masks = draw_masks(
        Unmasked(block.tokens_T, block.lengths_Nx2, ids), 0, default_masking(probability=0.3), vocabulary
    )
    return Samples(block.tokens_T, block.lengths_Nx2, block.random_next_N, ids, None), masks


def slow_pack(parts: list[tuple[Samples, Masks]]) -> dict[str, list[int]]:
    names = ("input_ids", "position_ids", "token_type_ids", "cu_seqlens", "masked_index", "mlm_labels", "nsp_labels")
    out: dict[str, list[int]] = {name: [] for name in names}
    for samples, masks in parts:
        token = mask = 0
        for i in range(len(samples.lengths_Nx2)):
            first, total = samples.lengths_Nx2[i].tolist()
            row = samples.tokens_T[token : token + total].tolist()
            start = len(out["input_ids"])
            out["cu_seqlens"].append(start)
            out["position_ids"] += range(total)
            out["token_type_ids"] += [0] * first + [1] * (total - first)
            shown = list(row)
            for _ in range(int(masks.counts_N[i])):
                position = int(masks.positions_M[mask])
                out["masked_index"].append(start + position)
                out["mlm_labels"].append(row[position])
                shown[position] = int(masks.tokens_M[mask])
                mask += 1
            out["input_ids"] += shown
            out["nsp_labels"].append(int(samples.random_next_N[i]))
            token += total
    out["cu_seqlens"].append(len(out["input_ids"]))
    return out


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.sampled_from(["nsp", "none"]), st.integers(0, 2**32))
def test_pack_equals_a_slow_loop(sizes: list[int], objective: str, seed: int) -> None:
    rng = random.Random(seed)
    parts = [random_part(rng, size, objective) for size in sizes]
    batch = pack(parts)
    expected = slow_pack(parts)
    found = {name.rpartition("_")[0] or name: value for name, value in batch._asdict().items()}
    found["cu_seqlens"] = batch.cu_seqlens
    for name, values in expected.items():
        assert found[name].tolist() == values, name
    lengths = [b - a for a, b in pairwise(expected["cu_seqlens"])]
    assert (batch.max_seqlen, batch.tokens_squared) == (max(lengths), sum(n * n for n in lengths))
    assert batch.cu_seqlens.dtype == torch.int32
    assert {part.dtype for part in batch if isinstance(part, torch.Tensor)} == {torch.int32, torch.int64}


def test_bounded_batches_have_few_shapes_and_the_same_content(corpus: Path) -> None:
    """Extra tokens and masked positions stand behind the real ones; what counts is unchanged."""
    reader = TrainingCorpus(corpus)
    shapes = set()
    for start in range(0, 240, 8):
        batch = reader.training_batch(1, np.arange(start, start + 8))
        padded = bounded(batch)
        shapes.add((len(padded.input_ids_T), len(padded.mlm_labels_M), padded.max_seqlen))
        assert digest(padded) == digest(batch)
        assert torch.equal(padded.cu_seqlens, batch.cu_seqlens)
        assert (padded.mlm_labels_M[batch.num_masked :] == IGNORED).all()
        assert len(padded.input_ids_T) % 256 == len(padded.mlm_labels_M) % 16 == padded.max_seqlen % 16 == 0
    assert len(shapes) <= 4
    many = reader.training_batch(1, np.arange(240))
    assert many.num_masked > 256
    assert len(bounded(many).mlm_labels_M) % 64 == 0


def test_moving_a_batch_keeps_its_numbers(corpus: Path) -> None:
    batch = TrainingCorpus(corpus).sample_batch()
    moved = batch.to(torch.device("cpu"))
    assert same(batch, moved)


def same(one: MicroBatch, other: MicroBatch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def digest(batch: MicroBatch) -> list[str]:
    """A hash per sample: its tokens, types, labels and masks."""
    rows = []
    for i, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        index_M = batch.masked_index_M[: batch.num_masked]
        inside = torch.nonzero((index_M >= start) & (index_M < end)).flatten()
        parts = (
            batch.input_ids_T[start:end],
            batch.position_ids_T[start:end],
            batch.token_type_ids_T[start:end],
            batch.masked_index_M[inside] - start,
            batch.mlm_labels_M[inside],
            batch.nsp_labels_N[i : i + 1],
        )
        rows.append(hashlib.sha256(b"|".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return rows


def test_global_batches_are_the_same_for_every_layout(corpus: Path) -> None:
    def steps(world_size: int, micro_batch_size: int) -> list[list[str]]:
        ranks = [MicroBatches(corpus, 7, Layout(rank, world_size, micro_batch_size, 24)) for rank in range(world_size)]
        accumulation = ranks[0].layout.accumulation
        found = []
        for step in range(14):  # into the second epoch of 300
            batches = [rank[step * accumulation + micro] for micro in range(accumulation) for rank in ranks]
            found.append([row for batch in batches if isinstance(batch, MicroBatch) for row in digest(batch)])
        return found

    reference = steps(1, 24)
    assert len({row for step in reference[:12] for row in step}) == 288
    for world_size, micro_batch_size in ((1, 3), (2, 4), (3, 8), (4, 6), (8, 3)):
        assert steps(world_size, micro_batch_size) == reference


@pytest.mark.parametrize("passes", [1, 2])
def test_a_batch_that_spans_epochs(tmp_path: Path, passes: int) -> None:
    """Each sample of it comes with its own epoch's pass and draw, as if it were alone."""
    make_corpus(tmp_path, samples=10, val=0, passes=passes, baked_draws=1)
    opened = TrainingCorpus(tmp_path)
    positions = np.arange(5, 45)
    whole = opened.training_batch(3, positions)
    alone = [opened.training_batch(3, positions[i : i + 1]) for i in range(40)]
    assert digest(whole) == [row for batch in alone for row in digest(batch)]
    place = locate(3, positions, opened.pass_sizes)
    assert len(set(place.epochs_N.tolist())) == 5
    # A later visit of a pass shows the same samples under other masks.
    visits: dict[tuple[int, int], set[str]] = {}
    for batch, epoch, sample in zip(alone, place.epochs_N.tolist(), place.samples_N.tolist(), strict=True):
        visits.setdefault((epoch % passes, sample), set()).add(digest(batch)[0])
    assert sum(len(rows) for rows in visits.values()) > 30


@pytest.mark.parametrize("strategy_seed", [1, 2])
def test_baked_and_live_draws_are_equal(tmp_path: Path, strategy_seed: int) -> None:
    masking = default_masking(seed=strategy_seed)
    folders = [tmp_path / str(draws) for draws in (0, 1, 3)]
    for draws, folder in zip((0, 1, 3), folders, strict=True):
        folder.mkdir()
        make_corpus(folder, samples=40, val=9, baked_draws=draws, masking=masking)
    live, one, three = (TrainingCorpus(folder) for folder in folders)
    for first in (0, 40, 80, 120, 37):  # draws 0, 1, 2, 3, and a batch that spans two
        positions = np.arange(first, first + 20)
        reference = live.training_batch(1, positions)
        assert same(one.training_batch(1, positions), reference)
        assert same(three.training_batch(1, positions), reference)
    assert same(live.val_batch(np.arange(9)), three.val_batch(np.arange(9)))


def test_live_masks_follow_their_curve(tmp_path: Path) -> None:
    """Rates of the corpus give its own masks, drawn or baked; others are those of each sample's place in the run."""
    make_corpus(tmp_path, samples=40, val=9, masking=default_masking(probability=0.2))
    own, live = TrainingCorpus(tmp_path), TrainingCorpus(tmp_path)
    positions = np.arange(10, 60)  # over the end of an epoch
    rate = Curve(((0, 0.2), (0.25, 0.2), (0.25, 0.5), (1, 0.1)))
    live.mask_live(LiveMasks(rate, Curve(((0, 0.8), (0.5, 0.8), (0.5, 0.0))), Curve(((0, 0.1),)), 80))
    assert same(live.training_batch(1, positions[:10]), own.training_batch(1, positions[:10]))
    assert same(live.val_batch(np.arange(9)), own.val_batch(np.arange(9)))
    mask_id, hidden = own.manifest.tokenizer.mask_id, 0
    for position in positions.tolist():
        batch, share = live.training_batch(1, np.array([position])), position / 80
        assert batch.num_masked == max(1, round(rate.at(share) * batch.num_tokens)), position
        masks = int((batch.input_ids_T[batch.masked_index_M] == mask_id).sum())
        assert not masks or share < 0.5
        hidden += masks
    assert hidden
    whole, ones = live.training_batch(1, positions), [live.training_batch(1, positions[i : i + 1]) for i in range(50)]
    assert whole.input_ids_T.tolist() == [token for one in ones for token in one.input_ids_T.tolist()]


def test_a_masking_probability_beyond_max_predictions(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, samples=9, val=0, masking=default_masking(max_predictions=6))
    data = compose("train", TrainConfig, ["run=r", "data.path=d", "data.masking_probability=[[0,0.25],[1,0.3]]"]).data
    with pytest.raises(UserError, match=r"0\.3 of 24 tokens are 7 predictions, and the corpus has at most 6; lower it"):
        check_masking(data, manifest)
    check_masking(replace(data, masking_probability=0.25), manifest)
    assert live_masks(replace(data, masking_probability=None), 9) is None


def test_validation_is_the_same_every_time(corpus: Path) -> None:
    one, other = TrainingCorpus(corpus), TrainingCorpus(corpus)
    one.training_batch(0, np.arange(500))
    assert same(one.val_batch(np.arange(37)), other.val_batch(np.arange(37)))


def test_an_empty_corpus_is_one_line(tmp_path: Path) -> None:
    make_corpus(tmp_path, samples=0, val=4)
    with pytest.raises(UserError, match="holds no training samples"):
        TrainingCorpus(tmp_path)


# The DataLoader

Steps = Callable[..., list[list[MicroBatch]]]


@pytest.mark.slow
def test_steps_with_and_without_workers(corpus: Path) -> None:
    """Starting at position 48 is going on after three steps of 16, or after six micro-batches where steps differ."""
    whole = MicroBatches(corpus, 7, Layout(1, 2, 4, 16))
    rest = MicroBatches(corpus, 7, Layout(1, 2, 4, 16), first_position=48)
    even: list[list[int]] = [[6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
    growing: list[list[int]] = [[6], [7], [8, 9], [10, 11, 12], [13, 14, 15]]
    for workers, indices, counts in ((0, even, 5), (2, even, 5), (0, growing, [1, 1, 2, 3, 3])):
        expected = [[whole[i] for i in step] for step in indices]
        steps = list(training_steps(rest, steps=counts, workers=workers, prefetch=2, pin_memory=False))
        assert len(steps) == 5
        for step, wanted in zip(steps, expected, strict=True):
            assert all(isinstance(b, MicroBatch) and same(a, b) for a, b in zip(step, wanted, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_shard_is_one_line_from_a_worker_too(tmp_path: Path, workers: int) -> None:
    make_corpus(tmp_path, samples=64, samples_per_block=8, shards_per_split=1)
    path = tmp_path / "pass-00" / "000000.tar"
    data = bytearray(path.read_bytes())
    entry = read_manifest(tmp_path).split_shards("pass-00")[0]
    data[entry.blocks.offsets[5] + 700] ^= 1
    path.write_bytes(data)
    dataset = MicroBatches(tmp_path, 1, Layout(0, 1, 4, 8))
    with pytest.raises(CorruptShard, match=r"pass-00/000000\.tar: block 5: its checksum differs.*prepare") as caught:
        list(training_steps(dataset, steps=8, workers=workers, prefetch=2, pin_memory=False))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_vanishes_is_one_line(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path, samples=8, val=0)
    dataset = MicroBatches(tmp_path, 1, Layout(0, 1, 4, 8))
    assert isinstance(dataset[0], MicroBatch)
    (tmp_path / "manifest.json").unlink()
    fresh = MicroBatches(tmp_path, 1, Layout(0, 1, 4, 8))
    assert isinstance(fresh[0], UserError)
    write_manifest(tmp_path, replace(manifest, seed=1))
    assert isinstance(fresh[0], MicroBatch)
