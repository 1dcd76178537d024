"""Contrastive learning by two ranks, as torchrun starts them, gives the weights of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.unit.test_embedding import write_pairs
from tests.unit.tiny_bert import write_tiny_bert


def learn(folder: Path, out: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    given = [
        "task=retrieval",
        f"model={folder}/model",
        f"data.train={folder}/train.tsv",
        f"data.dev={folder}/train.tsv",
    ]
    given += [f"out={folder}/{out}", "optim.lr=1e-3", "dropout=0", "max_len=24", *arguments]
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "finetune", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    write_tiny_bert(tmp_path / "model")
    write_pairs(tmp_path)
    two = learn(tmp_path, "two", "batch_size=6", launcher=("torch.distributed.run", "--nproc_per_node", "2"))
    one = learn(tmp_path, "one", "batch_size=12")
    assert two.replace("/two:", "/one:") == one, "rank 0 alone tells, and the same scores"
    weights, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
    moved = max(float((wanted[name] - before[f"bert.{name}"]).abs().max()) for name in wanted)
    assert moved > 1e-3, "and they have learned something"
