"""Contrastive learning by two ranks, as torchrun starts them: the weights of one process, also after a kill."""

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

RANKS = ("torch.distributed.run", "--nproc_per_node", "2")
KILLED = """import os
import sys
from finetune import resume, train
from finetune.__main__ import main

train._CHECKPOINT_SECONDS, train._STEPS_OF_RANKS = 0.0, 1
original = resume.seal


def seal(folder):
    original(folder)
    if folder.name == "checkpoint-3":
        os._exit(9)


resume.seal = seal
sys.exit(main(sys.argv[1:]))
"""


def learn(folder: Path, out: str, *arguments: str, launcher: tuple[str, ...] = (), script: str | None = None) -> str:
    """What it printed; of a `script`, that stands in for the command and is to fail, what it said."""
    given = [
        "task=retrieval",
        f"model={folder}/model",
        f"data.train={folder}/train.tsv",
        f"data.dev={folder}/train.tsv",
    ]
    given += [f"out={folder}/{out}", "optim.lr=1e-3", "dropout=0", "max_len=24", *arguments]
    program = [script] if script else [*(["-m"] if launcher else []), "finetune"]
    command = [sys.executable, "-m", *launcher, *program, *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert (done.returncode == 0) == (script is None), done.stderr
    return done.stdout + done.stderr * (out == "resumed" or script is not None)


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    write_tiny_bert(tmp_path / "model")
    write_pairs(tmp_path)
    two = learn(tmp_path, "two", "batch_size=6", launcher=RANKS)
    one = learn(tmp_path, "one", "batch_size=12")
    assert two.replace("/two:", "/one:") == one, "rank 0 alone tells, and the same scores"
    weights, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
    moved = max(float((wanted[name] - before[f"bert.{name}"]).abs().max()) for name in wanted)
    assert moved > 1e-3, "and they have learned something"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_ranks_go_on_within_a_seed(tmp_path: Path) -> None:
    """Rank 0 dies behind a checkpoint within an epoch: the same weights to the bit, each rank's dropout too."""
    write_tiny_bert(tmp_path / "model")
    write_pairs(tmp_path)
    own = ["batch_size=6", "epochs=2", "dropout=0.1"]
    (tmp_path / "killed.py").write_text(KILLED)
    learn(tmp_path, "whole", *own, launcher=RANKS)
    learn(tmp_path, "resumed", *own, launcher=RANKS, script=str(tmp_path / "killed.py"))
    assert (tmp_path / ".resumed.unfinished" / "checkpoints" / "seed-1" / "checkpoint-3" / "whole").exists()
    assert "seed 1  goes on at step 3" in learn(tmp_path, "resumed", *own, launcher=RANKS)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    assert not (tmp_path / ".resumed.unfinished").exists()
