"""What can be known of a GPU without one: tests/cuda_trace.py traces steps on fake tensors, here stands what is right.

What such a trace cannot show is said there.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloze import cli
from pretrain.config import Attention, TrainConfig, padded_vocab_size
from pretrain.plan import Shape, memory
from tests.support import ROOT, environment

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA itself: see tests/gpu")
VOCAB = 30_522
ROWS = 30_528  # of the embedding matrix: filled up to a multiple of 64
ONE_WAIT = ["reads a number: engine._before_step"]  # of an update: whether gradients are finite. It is deliberate
SMALL = ("model=base", "model.num_layers=1", "micro_batch_size=8", "global_batch_size=8")
MODERN = ("model=modernbert_base", "model.num_layers=2", "micro_batch_size=8", "global_batch_size=8")


def case(*overrides: str, **rest: Any) -> dict[str, Any]:
    return {"overrides": overrides, "max_len": 64, "masked": 64, **rest}


def large_case(model: str, max_len: int, tokens: int, *overrides: str) -> dict[str, Any]:
    """A micro-batch whose rectangle is of `tokens`, an eighth of it padding."""
    samples, real = tokens // max_len, tokens * 7 // 8
    sizes = (f"model={model}", f"micro_batch_size={samples}", f"global_batch_size={samples}")
    return case(*sizes, *overrides, max_len=max_len, tokens=real, masked=real * 3 // 20 // 64 * 64)


STEPS = {
    "sdpa-bf16": case(*SMALL, "precision=bf16", "model.attention=sdpa"),
    "sdpa-fp16": case(*SMALL, "precision=fp16", "model.attention=sdpa"),
    "varlen-bf16": case(*SMALL, "precision=bf16"),
    "varlen-fp16": case(*SMALL, "precision=fp16"),
}
FAULTS = {
    "a number is read": case(*SMALL, "precision=bf16", fault="item"),
    "a copy that waits": case(*SMALL, "precision=bf16", fault="copy"),
    "a shape that depends on data": case(*SMALL, "precision=bf16", fault="nonzero"),
}
MORE_STEPS = {
    "sdpa-fp32": case(*SMALL, "precision=fp32"),
    "varlen-modernbert": case(*MODERN, "precision=bf16"),
    "sdpa-modernbert": case(*MODERN, "precision=bf16", "model.attention=sdpa"),
    "varlen-lamb": case(*SMALL, "precision=bf16", "optim=lamb", "optim.lr=1e-3"),
    "varlen-muon": case(*SMALL, "precision=fp16", "optim=muon"),
    "varlen-accumulated": case(*SMALL, "precision=bf16", "micro_batch_size=4"),
    "sdpa-recomputed": case(*SMALL, "precision=bf16", "model.attention=sdpa", "model.activation_checkpointing=true"),
}
BIAS = case(*SMALL, "precision=bf16", slope=0.5)
PEAK = large_case("base", 128, 8192, "precision=bf16")
PEAKS = [
    *(large_case(model, length, 8192, "precision=bf16") for model in ("base", "large") for length in (128, 512)),
    large_case("base", 512, 8192, "precision=bf16", "model.attention=sdpa"),
    large_case("large", 128, 1024, "precision=fp16"),
    large_case("base", 128, 4096, "precision=fp32"),
    large_case("base", 128, 1024, "precision=bf16", "optim=muon"),
    large_case("base", 128, 8192, "precision=bf16", "global_batch_size=128"),
    large_case("base", 512, 8192, "precision=bf16", "model.activation_checkpointing=true"),
    large_case("modernbert_base", 512, 8192, "precision=bf16"),
]


def traced(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.cuda_trace", str(folder / "cases.json")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_step(name: str, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    kernel, *_ = name.split("-")
    *_, precision = (word.partition("=")[2] for word in asked["overrides"] if word.startswith("precision"))
    samples, layers = (4 if name.endswith("accumulated") else 8), (2 if "modernbert" in name else 1)
    low = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    pairs = "float32" if "modernbert" in name else low  # zeros there, in the type of the residual
    assert found["kernel"] == kernel
    assert found["seen"] == [
        f"torch.{low} [{asked['masked']}, {ROWS}] cuda:0",
        f"torch.{pairs} [{samples}, 2] cuda:0",
        "torch.float32 [] cuda:0",
    ]
    assert found["gradients"] == found["moments"] == ["torch.float32 cuda:0"]
    assert found["waits"] == {"backward": [], "step": ONE_WAIT}
    assert found["applied"]
    operators = found["operators"]
    forward = {"varlen": "_flash_attention_forward", "sdpa": "_scaled_dot_product_efficient_attention"}[kernel]
    backward = forward.replace("_forward", "") + "_backward"
    passes = 2 if name.endswith(("accumulated", "recomputed")) else 1  # of the forward pass
    assert operators[forward] == layers * passes
    assert operators[backward] == layers * (2 if name.endswith("accumulated") else 1)


@pytest.mark.slow
def test_a_step_on_a_gpu_waits_once(tmp_path: Path) -> None:
    """Both kernels in both precisions: shapes, types, devices, and nothing that waits but the look at the gradients.

    And a trace finds what it should: a number that is read, a copy, a shape that depends on data. And `plan` knows the
    peak of BERT-base.
    """
    steps, faults = len(STEPS), list(FAULTS)
    found = traced(tmp_path, [*STEPS.values(), *FAULTS.values(), PEAK])
    for (name, asked), one in zip(STEPS.items(), found[:steps], strict=True):
        check_step(name, asked, one)
    told = dict(zip(faults, found[steps:-1], strict=True))
    assert told["a number is read"]["waits"]["backward"] == ["reads a number: engine.backward"]
    assert told["a copy that waits"]["waits"]["backward"] == ["copies between devices: engine.backward"]
    assert told["a shape that depends on data"]["raised"] == "aten.nonzero.default"
    check_peak(PEAK, found[-1])


@pytest.mark.slow
def test_other_steps(tmp_path: Path) -> None:
    """ModernBERT with its windows, fp32, LAMB, Muon, several micro-batches, recomputed layers, the distance bias."""
    found = traced(tmp_path, [*MORE_STEPS.values(), BIAS])
    for (name, asked), one in zip(MORE_STEPS.items(), found[:-1], strict=True):
        check_step(name, asked, one)
    assert found[-1]["kernel"] == "varlen"
    assert "_flash_attention_forward" not in found[-1]["operators"], "its gradient knows nothing of a bias"
    assert found[-1]["waits"] == {"backward": [], "step": ONE_WAIT}


def check_peak(asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """plan's within 10% of the trace's."""
    overrides = ["run=r", "data.path=d", "zero=0", *asked["overrides"]]
    config = cli.compose("train", TrainConfig, overrides)
    config = replace(config, model=replace(config.model, attention=Attention(found["kernel"])))
    rows = padded_vocab_size(VOCAB, config.model.pad_vocab_to)
    samples = config.micro_batch_size
    shape = Shape(samples * asked["max_len"], asked["tokens"], asked["masked"], asked["masked"] + samples, rows)
    said = memory(config, found["parameters"], 1, shape)
    assert said.peak == pytest.approx(found["peak"], rel=0.1), (overrides, said)


@pytest.mark.slow
def test_plan_knows_the_peak_of_a_step(tmp_path: Path) -> None:
    for asked, found in zip(PEAKS, traced(tmp_path, PEAKS), strict=True):
        check_peak(asked, found)
