"""Whole runs on one GPU against plain PyTorch on the CPU: LAMB, offload, compiled layers, plan's memory, no waiting."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloze import cli
from cloze.corpus.manifest import read_manifest
from pretrain.config import Attention, TrainConfig, ZeroStage
from pretrain.plan import DEFAULTS, GIB, corpus_options, memory, shape_of
from tests.dist.test_lamb import LAMB, LONG, STEPS, plain_lamb
from tests.dist.test_stages import Plain
from tests.support import ROOT, TINY, Result, environment, later_wins, make_corpus, read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(folder: Path, *overrides: str, before: str = "") -> Result:
    """A run of one process, after `before`, which is Python; overrides come after `TINY`."""
    argv = later_wins(*TINY, f"runs_root={folder}", "run=run", *overrides)
    program = f"import runpy, sys; sys.argv = ['train.py', *{argv!r}]\n{before}\n"
    program += "runpy.run_module('pretrain.train', run_name='__main__', alter_sys=True)"
    devices = {key: value for key, value in os.environ.items() if key == "CUDA_VISIBLE_DEVICES"}
    hidden = {key: value for key, value in environment().items() if key != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=hidden | devices, cwd=ROOT, capture_output=True, text=True, check=False)
    (folder / "stdout").write_text(done.stdout)
    return Result((done.returncode,), (done.stderr,), read_metrics(folder / "run"), folder / "run")


@pytest.fixture(scope="module")
def lamb(corpus: Path) -> Plain:
    return plain_lamb(corpus, *LAMB, *LONG).train(STEPS)


@pytest.mark.parametrize("zero", [stage.value for stage in ZeroStage])
def test_lamb_equals_the_unsharded_algorithm(corpus: Path, tmp_path: Path, lamb: Plain, zero: str) -> None:
    result = run(tmp_path, f"data.path={corpus}", f"zero={zero}", *LAMB, *LONG)
    assert result.codes == (0,), result.stderr
    assert result.series("train/loss") == pytest.approx(lamb.losses, abs=1e-5)
    weights = load_file(result.run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    for name, parameter in lamb.model.hf.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def plain(corpus: Path) -> Plain:
    return Plain(corpus).train(6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero", [stage.value for stage in ZeroStage])
def test_half_precision_stays_close_to_plain_pytorch(
    corpus: Path, tmp_path: Path, plain: Plain, zero: str, precision: str, compiled: bool
) -> None:
    """By the variable-length kernel. Compiled layers are whole, and built once for training and once for evaluation."""
    if zero[0] == "3" and compiled:
        pytest.skip("refused")
    options = (f"zero={zero}", f"precision={precision}", f"compile={str(compiled).lower()}", "eval.every=2")
    count = (
        "import atexit, json, torch, torch._dynamo.utils as dynamo\n"
        "atexit.register(lambda: print(json.dumps({'graphs': dynamo.counters['stats']['unique_graphs'],"
        " 'breaks': len(dynamo.counters['graph_break'])})))"
    )
    scale = ["deepspeed.extra={fp16:{initial_scale_power:8}}"] if precision == "fp16" else []
    result = run(tmp_path, f"data.path={corpus}", *options, *scale, before=count)
    assert result.codes == (0,), result.stderr
    assert result.series("train/skipped_steps") == [0] * 6
    assert result.series("train/loss") == pytest.approx(plain.losses, abs=0.03)
    counted = json.loads((tmp_path / "stdout").read_text().splitlines()[-1])
    assert counted == {"graphs": 2 * compiled, "breaks": 0}


@pytest.mark.parametrize("zero", ["0", "1", "2", "3", "2_offload"])
def test_plan_knows_the_peak(tmp_path: Path, zero: str) -> None:
    """BERT-base, two micro-batches of 64 samples of up to 128 tokens."""
    (tmp_path / "corpus").mkdir()
    make_corpus(tmp_path / "corpus", samples=512, max_len=128, vocab_size=8192)
    sizes = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072, "max_positions": 512}
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    overrides += [
        f"data.path={tmp_path / 'corpus'}", f"zero={zero}", "precision=bf16", "global_batch_size=128",
        "micro_batch_size=64", "steps=3", "model.dropout=0.1", "model.attention_dropout=0.1",
    ]  # fmt: skip
    result = run(tmp_path, *overrides)
    assert result.codes == (0,), result.stderr
    config = cli.compose("train", TrainConfig, [*TINY, "run=r", *overrides])
    config = replace(config, model=replace(config.model, attention=Attention.varlen))
    options = corpus_options(DEFAULTS, read_manifest(tmp_path / "corpus"))
    weights = load_file(result.run / "checkpoints" / "step-00000003" / "model.safetensors")
    need = memory(config, sum(weight.numel() for weight in weights.values()), 1, shape_of(64, options, 8192))
    assert max(result.series("memory/peak_gib")) == pytest.approx(need.peak / GIB, rel=0.3), need


@pytest.mark.parametrize("zero", ["0", "1", "2"])
def test_the_host_never_waits_inside_a_micro_batch(corpus: Path, tmp_path: Path, zero: str) -> None:
    """From the copy to the device to the end of the backward pass; only the update may wait, for what is finite."""
    strict = (
        "import torch; from pretrain.engine.engine import Engine; backward, calls = Engine.backward, 0\n"
        "def watched(self, *arguments, **options):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    torch.cuda.set_sync_debug_mode('error' if calls > 8 else 'default')\n"  # libraries are set up by then
        "    try:\n"
        "        return backward(self, *arguments, **options)\n"
        "    finally:\n"
        "        torch.cuda.set_sync_debug_mode('default')\n"
        "Engine.backward = watched"
    )
    options = ("precision=bf16", "model.dropout=0.1", "model.attention_dropout=0.1")
    result = run(tmp_path, f"data.path={corpus}", f"zero={zero}", *options, before=strict)
    assert result.codes == (0,), result.stderr


def test_the_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/train_gpu.py", "--tiny", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "best is" in done.stdout
