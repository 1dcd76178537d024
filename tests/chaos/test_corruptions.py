"""A thousand random corruptions of shards, manifests and checkpoints: all found, none trained on, no traceback.

`data_prep.verify` finds every one in a corpus. What reads it for training, mapped, streamed or into a node's cache,
refuses it or gives the original samples to the byte: bytes that training never reads, such as padding between tar
members, are no reason to stop it.
"""

import io
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch

from cloze.corpus.manifest import VAL, read_manifest
from cloze.corpus.shards import Samples, Split
from cloze.corpus.verify import faults
from cloze.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import MOMENTS, LossScale, Snapshot, TrainingState
from pretrain.data import cache
from pretrain.data.stream import Streamed
from tests.support import make_corpus, make_identity

Damage = Callable[[random.Random, Path, list[Path]], str]


def flip_bit(rng: random.Random, path: Path, others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "bit flipped"


def truncate(rng: random.Random, path: Path, others: list[Path]) -> str:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return "truncated"


def zero_block(rng: random.Random, path: Path, others: list[Path]) -> str:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    if bytes(data) == path.read_bytes():
        return flip_bit(rng, path, others)
    path.write_bytes(data)
    return "block zeroed"


def duplicate(rng: random.Random, path: Path, others: list[Path]) -> str:
    """A tar member, its header and padding with it; of another file some bytes."""
    data, kind = path.read_bytes(), "member doubled"
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            member = rng.choice(tar.getmembers())
        start, end = member.offset, member.offset_data + -(-member.size // 512) * 512
    else:
        start, kind = rng.randrange(len(data)), "part doubled"
        end = start + 512
    path.write_bytes(data[:end] + data[start:])
    return kind


def swap(rng: random.Random, path: Path, others: list[Path]) -> str:
    other = rng.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    if one == two:
        return flip_bit(rng, path, others)
    path.write_bytes(two)
    other.write_bytes(one)
    return "files swapped"


DAMAGES: tuple[Damage, ...] = (flip_bit, flip_bit, truncate, zero_block, duplicate, swap)


Rows = dict[int, tuple[object, ...]]  # what a reader gives of each sample, by its id


def rows(samples: Samples) -> Rows:
    assert samples.masks
    tokens = np.split(samples.tokens_T, np.cumsum(samples.lengths_Nx2[:-1, 1], dtype=int))
    ends = np.cumsum(samples.masks.counts_N[:-1], dtype=int)
    masks = [np.split(column, ends) for column in samples.masks[1:]]
    columns = (tokens, *masks, samples.lengths_Nx2, samples.random_next_N)
    parts = zip(*([part.tolist() for part in column] for column in columns), strict=True)
    return dict(zip(samples.ids_N.tolist(), parts, strict=True))


def mapped(corpus: Path, *splits: str) -> Rows:
    manifest, found = read_manifest(corpus), Rows()
    for name in splits or manifest.splits:
        split = Split(corpus, manifest, name)
        found |= rows(split.gather(np.arange(len(split)), 0))
    return found


def streamed(corpus: Path) -> Rows:
    """`val` is mapped then."""
    stream = Streamed(str(corpus), read_manifest(corpus), 1, lanes=4, window=16)
    try:
        ((samples, _),) = stream.gather(np.arange(120))
    finally:
        stream._pool.shutdown(cancel_futures=True)
    return rows(samples) | mapped(corpus, VAL)


def cached(corpus: Path) -> Rows:
    with redirect_stderr(io.StringIO()):  # it tells how far it is
        return mapped(cache.local_corpus(str(corpus), str(corpus.with_name("cache")), 1))


WAYS: tuple[Callable[[Path], Rows], ...] = (mapped, streamed, cached)


@pytest.mark.timeout(600)
def test_corpora(tmp_path: Path) -> None:
    make_corpus(tmp_path / "whole", samples=120, val=20, vocab_size=300)
    assert list(faults(tmp_path / "whole")) == []
    original = mapped(tmp_path / "whole")
    rng, seen = random.Random(5), Counter[str]()
    for _ in range(600):
        corpus = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", corpus)
        files = sorted([*corpus.glob("*/*.tar"), corpus / "manifest.json"])
        path = rng.choice(files)
        kind = rng.choice(DAMAGES)(rng, path, [file for file in files if file != path])
        found = list(faults(corpus))
        assert found, f"{path.name} {kind}: not found"
        assert all("\n" not in fault for fault in found)
        seen[f"{path.suffix} {kind}: found"] += 1
        for way in WAYS:
            refusal, what = None, None
            try:
                what = way(corpus)
            except UserError as error:
                refusal = str(error)
            assert refusal or what == original, f"{path.name} {kind}: other samples were {way.__name__}"
            assert "\n" not in (refusal or "")
            seen[f"{way.__name__}: {'refused' if refusal else 'never read'}"] += 1
        for folder in (corpus, tmp_path / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        while cache._in_use:
            os.close(cache._in_use.pop())
    print("\ncorpora:", dict(sorted(seen.items())), "trained on wrong data: 0")
    assert sum(count for name, count in seen.items() if name.endswith(": found")) == 600
    assert seen["mapped: refused"] > 550
    assert seen["cached: refused"] >= seen["mapped: refused"]


def save(folder: Path, step: int) -> None:
    state = TrainingState(
        step=step, samples=16 * step, tokens=99 * step, seconds=1.0, optimizer_steps=step, rollbacks=0,
        loss_scale=LossScale(), identity=make_identity(), wandb_id=None,
    )  # fmt: skip
    torch.manual_seed(step)
    weights = {"a": torch.randn(7, 5), "b": torch.randn(11)}
    moments = {f"{name}.{kind}": torch.rand_like(value) for name, value in weights.items() for kind in MOMENTS}
    checkpoint.write(folder, Snapshot(state, weights, moments, f"steps: {step}\n"))


@pytest.mark.timeout(600)
def test_checkpoints(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for step in (10, 20, 30):
        save(whole, step)
    rng, seen = random.Random(6), Counter[str]()
    for _ in range(400):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        struck = rng.sample((10, 20, 30), rng.choice((1, 1, 2)))
        for step in struck:
            files = sorted(checkpoint.path_of(folder, step).iterdir())
            path = rng.choice(files)
            kind = rng.choice(DAMAGES)(rng, path, [file for file in files if file != path])
            assert checkpoint.verify(checkpoint.path_of(folder, step)), f"{path.name} {kind}: not found"
            seen[f"{kind}: found"] += 1
        intact = [step for step in (30, 20, 10) if not checkpoint.verify(checkpoint.path_of(folder, step))]
        newest = checkpoint.newest_verified(folder, lambda _: None)
        assert newest == (checkpoint.path_of(folder, intact[0]) if intact else None)
        if newest is not None:
            loaded, right = checkpoint.load(newest), checkpoint.load(whole / newest.name)
            assert loaded.state == right.state
            assert all(torch.equal(loaded.weights[name], value) for name, value in right.weights.items())
            assert all(torch.equal(loaded.moments[name], value) for name, value in right.moments.items())
        shutil.rmtree(folder)
    print("\ncheckpoints:", dict(sorted(seen.items())), "wrong ones resumed: 0")
