"""A thousand random corruptions of shards, manifests and checkpoints: all found, none trained on, no traceback.

A corruption counts as harmless only if every sample that a reader gives is the original one (bytes that nobody reads,
such as padding between tar members, are covered by the checksums all the same).
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.manifest import read_manifest
from data_prep.shards import Samples, Split
from pretrain import checkpoint
from pretrain.checkpoint import Snapshot, TrainingState
from tests.support import make_corpus

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


def duplicate_part(rng: random.Random, path: Path, others: list[Path]) -> str:
    data = path.read_bytes()
    start = rng.randrange(0, len(data), 512) if len(data) > 512 else 0
    path.write_bytes(data[: start + 512] + data[start:])
    return "part doubled"


def swap(rng: random.Random, path: Path, others: list[Path]) -> str:
    other = rng.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    if one == two:
        return flip_bit(rng, path, others)
    path.write_bytes(two)
    other.write_bytes(one)
    return "files swapped"


DAMAGES: tuple[Damage, ...] = (flip_bit, flip_bit, truncate, zero_block, duplicate_part, swap)


def read_everything(corpus: Path) -> list[Samples]:
    manifest = read_manifest(corpus)
    found = []
    for name in sorted(manifest.splits):
        split = Split(corpus, manifest, name)
        found.append(split.gather(np.arange(len(split)), 0))
    return found


def same(one: list[Samples], other: list[Samples]) -> bool:
    flat = [[part for samples in side for part in (*samples[:4], *(samples.masks or ()))] for side in (one, other)]
    return len(flat[0]) == len(flat[1]) and all(np.array_equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.timeout(600)
def test_corpora(tmp_path: Path) -> None:
    make_corpus(tmp_path / "whole", samples=120, val=20, vocab_size=300)
    original = read_everything(tmp_path / "whole")
    rng, seen = random.Random(5), Counter[str]()
    for _ in range(600):
        corpus = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", corpus)
        files = sorted([*corpus.glob("*/*.tar"), corpus / "manifest.json"])
        path = rng.choice(files)
        kind = rng.choice(DAMAGES)(rng, path, [file for file in files if file != path])
        found, refusal = None, ""
        try:
            found = read_everything(corpus)
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
        assert found is None or same(found, original), f"{path.name} {kind}: other samples were read"
        seen[f"{path.suffix} {kind}: {'refused' if refusal else 'never read'}"] += 1
        shutil.rmtree(corpus)
    print("\ncorpora:", dict(sorted(seen.items())), "trained on wrong data: 0")
    assert sum(count for name, count in seen.items() if "refused" in name) > 550


def save(folder: Path, step: int) -> None:
    state = TrainingState(
        step=step, samples=16 * step, tokens=99 * step, seconds=1.0, optimizer_steps=step, loss_scale=1.0,
        manifest_sha256="0" * 64, tokenizer_fingerprint="1" * 64, seed=1, global_batch_size=16, wandb_id=None,
    )  # fmt: skip
    torch.manual_seed(step)
    weights = {"a": torch.randn(7, 5), "b": torch.randn(11)}
    moments = {f"{name}.{kind}": torch.randn_like(value) for name, value in weights.items() for kind in ("m", "v")}
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
            if not checkpoint.verify(checkpoint.path_of(folder, step)):
                # Only white space or the like of MANIFEST.json can change without a fault.
                assert path.name == "MANIFEST.json"
                seen[f"{kind}: harmless"] += 1
            else:
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
