"""Looking into a corpus: the same samples and masks as training reads, here and behind a URL."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cloze.corpus import Corpus, Sample, open_corpus
from cloze.corpus.shards import CorruptShard
from cloze.errors import UserError
from pretrain.data import loader
from tests.support import CLS, MASK, SEP, make_corpus, served

PASSES, SAMPLES = 2, 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "c", samples=SAMPLES, passes=PASSES, val=7, baked_draws=1)
    return tmp_path / "c"


def rows(samples: list[Sample]) -> list[tuple[object, ...]]:
    """What the model sees, its segments, its answers and its label; in no order."""
    return sorted(
        (s.input_ids_T.tolist(), s.segment_ids_T.tolist(), [x for x in s.labels_T.tolist() if x >= 0], s.label)
        for s in samples
    )


@pytest.mark.parametrize("epoch", range(2 * PASSES))  # the second draw is not in the shards
def test_an_epoch_is_what_training_reads(folder: Path, epoch: int) -> None:
    positions = np.arange(SAMPLES) + epoch * SAMPLES
    batch = loader.TrainingCorpus(folder).training_batch(seed=5, positions_N=positions)
    edges = batch.cu_seqlens.tolist()
    theirs = []
    for number, (start, end) in enumerate(pairwise(edges)):
        mine = (batch.masked_index_M >= start) & (batch.masked_index_M < end)
        ids, types = batch.input_ids_T[start:end].tolist(), batch.token_type_ids_T[start:end].tolist()
        theirs.append((ids, types, batch.mlm_labels_M[mine].tolist(), int(batch.nsp_labels_N[number])))
    assert rows(list(open_corpus(folder).epoch(epoch))) == sorted(theirs)


def test_length_samples_and_text(folder: Path) -> None:
    corpus = open_corpus(str(folder))
    assert len(corpus) == PASSES * SAMPLES
    val = corpus.split("val")
    assert len(val) == 7 == len(list(val))
    sample = val[-1]
    assert sample.id == val[6].id
    assert sample.tokens_T[0] == CLS
    (separators,) = np.nonzero(sample.tokens_T == SEP)
    assert sample.segment_ids_T.tolist() == [int(i > separators[0]) for i in range(len(sample.tokens_T))]
    answers = np.flatnonzero(sample.labels_T >= 0)
    assert answers.tolist() == sorted(sample.masked_positions_M.tolist())
    assert (sample.labels_T[answers] == sample.tokens_T[answers]).all()
    assert corpus.text(sample).split()[0] == "[CLS]"
    assert "[MASK]" not in corpus.text(sample)
    shown = [one for one in val if (one.input_ids_T == MASK).any()]
    assert shown
    assert all(corpus.text(one, masked=True).count("[MASK]") == (one.input_ids_T == MASK).sum() for one in shown)
    for index in (7, -8):
        with pytest.raises(IndexError):
            val[index]
    with pytest.raises(UserError, match=r"^test: no split of .*; there are pass-00, pass-01, val$"):
        corpus.split("test")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_corpus_behind_a_url(folder: Path, ranges: bool) -> None:
    with served(folder, ranges=ranges) as (url, requests):
        remote: Corpus = open_corpus(f"{url}/")
        here = open_corpus(folder)
        for epoch in range(3):
            assert [remote.epoch(epoch)[i].id for i in (49, 0, 20)] == [here.epoch(epoch)[i].id for i in (49, 0, 20)]
            assert rows([remote.epoch(epoch)[i] for i in (49, 0)]) == rows([here.epoch(epoch)[i] for i in (49, 0)])
        assert remote.text(remote.split("val")[0]) == here.text(here.split("val")[0])
        asked = [one for one in requests if one.startswith("/pass-00/000000.tar")]
        assert len(asked) <= 2 or not ranges, "blocks at hand are not fetched again"
        shard = folder / "val" / "000000.tar"
        shard.write_bytes(shard.read_bytes()[:600] + b"\1" + shard.read_bytes()[601:])
        with pytest.raises(CorruptShard, match=r"/val/000000.tar: block 0: its checksum differs"):
            open_corpus(url).split("val")[0]
        (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"/manifest.json: not there; name a corpus"):
            open_corpus(url)
