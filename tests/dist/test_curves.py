"""Every kind of curve in one run that is killed inside all of its ramps: it goes on to the same bits."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.dist.test_resume import bitwise, timeless
from tests.support import Trainer

CURVES = (
    "global_batch_size=[[0,8],[0.4,24]]", "model.dropout=[[0,0.3],[1,0]]", "model.attention_dropout=[[0,0],[0.8,0.2]]",
    "model.distance_bias=[[0,1.0],[0.8,0.1],[0.8,0]]", "loss.nsp_weight=[[0,0],[1,2]]",
    "loss.mlm_weight=[[0,1],[1,0.5]]",
    "optim.lr=[geometric,[0,3e-3],[1,1e-4]]", "data.masking_probability=[[0,0.3],[0.9,0.15]]",
    "data.mask_share=[[0,1.0],[0.7,0.8]]", "data.random_share=[[0,0],[0.7,0.1]]",
)  # fmt: skip
KILLED = """
import os, signal, time
from pathlib import Path
from pretrain.engine.engine import Engine

calls, real = 0, Engine.step

def step(self, lr):
    global calls
    calls += 1
    if calls == 5:
        while not list(Path({root!r}).glob("run/checkpoints/step-00000003/*")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, lr)

Engine.step = step
"""
LOGGED = ("samples", "train/masked_tokens", "train/lr", "curves/loss.nsp_weight", "curves/global_batch_size")


@pytest.mark.slow
def test_killed_inside_every_ramp(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    overrides = (f"data.path={corpus}", *CURVES, "checkpoint.every=3", "eval.every=3", "zero=1")
    series = []
    for ranks in (1, 2):
        root = tmp_path / str(ranks)
        whole = trainer.run(*overrides, ranks=ranks)
        assert set(whole.codes) == {0}, whole.stderrs
        killed = trainer.run(*overrides, f"runs_root={root}", ranks=ranks, before=KILLED.format(root=str(root)))
        assert -9 in killed.codes, killed.stderrs
        shutil.copytree(root, tmp_path / f"{ranks}-killed")
        resumed = trainer.run(*overrides, f"runs_root={root}", ranks=ranks)
        assert set(resumed.codes) == {0}, resumed.stderrs
        assert "resuming at step 3 of 6" in resumed.stderr
        assert timeless(resumed) == timeless(whole)
        assert bitwise(resumed, whole)
        series.append({key: whole.series(key) for key in LOGGED})
    assert series[0] == series[1]
    sizes = series[0]["curves/global_batch_size"]
    assert sizes[0] == 8 < sizes[-1] == 24
    other = trainer.run(*overrides, f"runs_root={tmp_path}/1-killed", ranks=2)  # at another world size, the same curves
    assert set(other.codes) == {0}, other.stderrs
    assert {key: other.series(key) for key in LOGGED} == series[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.masking_probability=0.9", "data.masking_probability: 0.9 of 24 tokens are 22 predictions"),
        ("global_batch_size=[[0,6],[1,8]]", "global_batch_size: grows in steps of 2, the common divisor of its points"),
    ],
)
def test_what_the_corpus_and_the_ranks_do_not_allow(trainer: Trainer, corpus: Path, override: str, words: str) -> None:
    result = trainer.run(f"data.path={corpus}", override)
    assert result.code == 64
    (line,) = result.errors
    assert words in line


def test_a_run_begun_with_batch_ramp_goes_on(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """From a checkpoint and a configuration that know nothing of curves; a curve in its place is told apart."""
    overrides = (f"data.path={corpus}", "batch_ramp.start=4", "batch_ramp.fraction=0.5", f"runs_root={tmp_path}")
    stopped = trainer.run(*overrides, "stop_at=2")
    assert stopped.code == 75, stopped.stderr
    folder = checkpoint.path_of(stopped.run / "checkpoints", 2)
    assert json.loads((folder / "state.json").read_text())["identity"]["batch_ramp"] == "from 4 in 0.5 of the run"
    refused = trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}", "global_batch_size=[[0,4],[0.5,16]]")
    assert refused.code == 64
    assert (
        "was trained with batch_ramp=from 4 in 0.5 of the run, now it is the curve [[0, 4], [0.5, 16]]"
        in refused.errors[0]
    )
    resumed = trainer.run(*overrides)
    assert resumed.code == 0, resumed.stderr
    assert resumed.series("samples") == [4, 12, 24, 40, 56, 72]


def test_a_look_at_each_layer(trainer: Trainer, corpus: Path) -> None:
    """On two ranks, and it changes no bit; the layers' gradients together are the gradient, before it is clipped."""
    overrides = (f"data.path={corpus}", "zero=0", "steps=3", "eval.every=3", "optim.clip=0.01")
    plain, watched = (trainer.run(*overrides, f"log.layers_every={every}", ranks=2) for every in (0, 2))
    assert set(watched.codes) == {0}, watched.stderrs
    assert bitwise(plain, watched)
    (row,) = [line for line in watched.metrics if "layers/0/grad_norm" in line]
    norms = [value for key, value in row.items() if key.startswith("layers/") and key.endswith("/grad_norm")]
    whole = next(line["train/grad_norm"] for line in watched.metrics if line["step"] == 2 and "train/loss" in line)
    assert row["step"] == 2
    assert len(norms) == 4  # embeddings, two layers, heads
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(whole, rel=1e-5)
    assert all(0 < row[f"layers/{layer}/update_ratio"] < 0.5 for layer in ("embeddings", "0", "1", "heads"))
    (entropies,) = [line for line in watched.metrics if "layers/0/attention_entropy" in line]
    assert entropies["step"] == 3
    assert all(0 < entropies[f"layers/{layer}/attention_entropy"] < 3.2 for layer in (0, 1))  # ln(24)
