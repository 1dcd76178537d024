"""Micro-batches for anybody's loop: padding against a slow loop, the layout of ranks, the loop that a page shows."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertForPreTraining

from cloze.errors import UserError
from pretrain.data import MicroBatch, MicroBatchDataset, padded
from tests.support import ROOT, make_corpus


def slow(batch: MicroBatch) -> dict[str, list[list[int]]]:
    edges = batch.cu_seqlens.tolist()
    longest = max(end - start for start, end in pairwise(edges))
    answers = dict(zip(batch.masked_index_M.tolist(), batch.mlm_labels_M.tolist(), strict=True))
    answers = {at: answer for at, answer in answers.items() if answer >= 0}
    out: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    for start, end in pairwise(edges):
        blank = longest - (end - start)
        out["input_ids"].append(batch.input_ids_T[start:end].tolist() + [0] * blank)
        out["attention_mask"].append([1] * (end - start) + [0] * blank)
        out["token_type_ids"].append(batch.token_type_ids_T[start:end].tolist() + [0] * blank)
        out["labels"].append([answers.get(at, -100) for at in range(start, end)] + [-100] * blank)
    return out


def test_padded_equals_a_slow_loop(corpus: Path) -> None:
    dataset = MicroBatchDataset(str(corpus), micro_batch_size=5, global_batch_size=10)
    for index in range(20):
        found = padded(dataset[index])
        assert found.pop("next_sentence_label").tolist() == dataset[index].nsp_labels_N.tolist()
        assert {name: values.tolist() for name, values in found.items()} == slow(dataset[index])
        assert all(values.dtype == torch.int64 for values in found.values())


def test_ranks_share_a_step(corpus: Path) -> None:
    sizes = {"micro_batch_size": 4, "global_batch_size": 16}
    alone = MicroBatchDataset(str(corpus), **sizes, seed=3)
    ranks = [MicroBatchDataset(str(corpus), **sizes, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert (alone.accumulation, ranks[0].accumulation) == (4, 2)
    for step in range(3):
        mine = [alone[step * 4 + i] for i in range(4)]
        theirs = [one[step * 2 + i] for one in ranks for i in range(2)]
        rows = [sorted(row for batch in side for row in padded_rows(batch)) for side in (mine, theirs)]
        assert rows[0] == rows[1]


def padded_rows(batch: MicroBatch) -> list[list[int]]:
    edges = batch.cu_seqlens.tolist()
    return [batch.input_ids_T[start:end].tolist() for start, end in pairwise(edges)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"micro_batch_size": 3}, "global_batch_size=8: not a multiple of micro_batch_size=3 x 1 ranks"),
        ({"world_size": 4}, "not a multiple of micro_batch_size=4 x 4 ranks"),
        ({"rank": 1}, "rank=1, world_size=1: sizes must be at least 1, and the rank below"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
    ],
)
def test_sizes_that_do_not_fit(corpus: Path, changes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        MicroBatchDataset(str(corpus), **({"micro_batch_size": 4, "global_batch_size": 8} | changes))


def test_damage_is_raised(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    for shard in tmp_path.glob("pass-00/*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1])
    dataset = MicroBatchDataset(str(tmp_path), micro_batch_size=4, global_batch_size=8)
    with pytest.raises(UserError, match="copy or prepare the corpus again"):
        next(iter(DataLoader(dataset, batch_size=None, sampler=range(1), collate_fn=padded)))
    with pytest.raises(UserError, match="s3://b/c: not on this machine"):
        MicroBatchDataset("s3://b/c", micro_batch_size=4, global_batch_size=8)


def test_the_loop_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/api.md trains Hugging Face's BERT: its very code, on a small corpus."""
    make_corpus(tmp_path / "shards" / "books", samples=600, max_len=24)
    monkeypatch.chdir(tmp_path)
    (loop,) = (
        source
        for source in re.findall(
            r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL | re.MULTILINE
        )
        if "BertForPreTraining" in source
    )
    assert loop.count("\n") <= 35
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(loop, "docs/api.md", "exec"), names)
    assert len(names["losses"]) == 30
    torch.manual_seed(0)
    untrained = BertForPreTraining(names["config"])
    batches = [padded(names["dataset"][index]) for index in range(8)]
    with torch.no_grad():
        before, after = (
            sum(float(model.eval()(**batch).loss) for batch in batches) / 8 for model in (untrained, names["model"])
        )
    assert abs(before - names["losses"][0]) < 0.2
    assert after < before - 0.03
