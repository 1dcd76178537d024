"""plan's memory against what autograd keeps, its arithmetic against figures worked out by hand, its errors."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloze import cli
from cloze.corpus.manifest import read_manifest
from cloze.errors import UserError
from pretrain import plan
from pretrain.config import Architecture, Attention, ModelConfig, TrainConfig
from pretrain.model.bert import PackedBert
from pretrain.plan import activation_bytes, check_memory, composed, corpus_options, draw_schedule, parameters_of
from tests.support import ROOT, make_corpus, tokenizer_facts
from tests.unit.test_attention import row_of
from tests.unit.test_model import small

LENGTH, SAMPLES = 128, 8


def config_of(model: ModelConfig, **changes: Any) -> TrainConfig:
    return replace(cli.compose("train", TrainConfig, ["run=r", "data.path=d"]), model=model, **changes)


def kept_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """What autograd keeps of a forward pass over full samples, parameters and indices apart."""
    facts = tokenizer_facts(61)
    module = PackedBert(model, facts, max_len=LENGTH).to(dtype).train()
    row = row_of([LENGTH] * SAMPLES, torch.device("cpu"))
    batch = row._replace(masked_index_M=torch.arange(8), nsp_labels_N=torch.zeros(SAMPLES, dtype=torch.long))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", Architecture)
def test_activations_of_a_layer_are_those_autograd_keeps(
    architecture: Architecture, checkpointing: bool, precision: str
) -> None:
    """By the difference of four layers and one: of both kinds, where a layer's mask for its window is left out."""
    model = small(
        hidden_size=64, intermediate_size=256, max_positions=LENGTH, architecture=architecture,
        attention=Attention.sdpa, activation_checkpointing=checkpointing,
    )  # fmt: skip
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shape = plan.Shape(SAMPLES * LENGTH, SAMPLES * LENGTH, 8, 8 + SAMPLES, 64)

    def ours(layers: int) -> int:
        config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"precision={precision}"])
        return activation_bytes(replace(config, model=replace(model, num_layers=layers)), shape)

    counted = kept_bytes(replace(model, num_layers=4), dtype) - kept_bytes(replace(model, num_layers=1), dtype)
    window_masks = 2 * SAMPLES * LENGTH * LENGTH * dtype.itemsize
    if architecture is Architecture.modernbert and not checkpointing:
        counted -= window_masks
    assert ours(4) - ours(1) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("name", "published"), [("base", 110e6), ("large", 336e6), ("tiny", 4.4e6)])
def test_parameters(name: str, published: float) -> None:
    model = cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"model={name}"]).model
    assert parameters_of(model, 30_522) == pytest.approx(published, rel=0.02)


def test_the_plan_of_large_on_64_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe=lamb_phase1", "gpus=64", "gpu=h200", "micro_batch_size=128", "mfu=0.5", "zero=2"]
    assert plan.main(arguments) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "65,536 = 64 h200 x accumulation 8 x micro-batch 128; samples of 128 tokens, 19.2 to predict" in out
    assert lines["step"].split()[1] == f"{65_536 * 128:,}"
    _, options = composed(arguments)
    assert (options.max_len, options.masking) == (128, 0.15)
    flops = 65_536 * (
        128 * 6 * 24 * 12 * 1024**2 + 12 * 24 * 1024 * 128**2 + 19.2 * 6 * (1024**2 + 1024 * 30_528)
        - (128 - 19.2 - 1) * 6 * 9 * 1024**2  # of the last layer
        + 6 * (1024**2 + 2048)
    )  # fmt: skip
    seconds = flops / (0.5 * 989.4e12 * 64)
    assert f"{seconds:.3f} s a step" in lines["speed"]
    assert f"{7_038 * seconds / 3600 * 64:,.0f} GPU-hours" in lines["run"]
    assert "4.03 GB" in lines["checkpoint"]  # 12 bytes for each of 336,232,258 parameters
    assert [line.split()[0] for line in out.splitlines()[-6:]] == ["0", "1", "2", "3", "2_offload", "3_offload"]
    assert out.splitlines()[-4].startswith("2 *")


def test_a_time_budget_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["recipe=budget_24h", "gpus=8", "gpu=a100"])
    assert ": 24 hours, 192 GPU-hours" in capsys.readouterr().out


def line_of(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> str:
    plan.main(list(arguments))
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))


def test_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """The table in docs/scaling.md is what plan says, and its errors are what follows."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(model=[^`]*)` \| ([\d,]+) \| ([\d,]+) \| ([+-]\d+%) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for arguments, *numbers, error in rows:
        published, predicted = (int(number.replace(",", "")) for number in numbers)
        said = line_of(capsys, "speed", "precision=bf16", *arguments.split()).split()[1]
        assert said.replace(",", "") == str(predicted), arguments
        assert f"{predicted / published - 1:+.0%}" == error
        assert abs(predicted / published - 1) < 0.4


def test_a_growing_batch_takes_fewer_hours(capsys: pytest.CaptureFixture[str]) -> None:
    """Linear from nearly nothing over half the run: a quarter less."""
    options = ("recipe=bert_2018", "micro_batch_size=1", "+gpus=1")
    whole, ramped = (
        float(line_of(capsys, "run", *options, *ramp).split()[-4])
        for ramp in ((), ("batch_ramp.start=1", "batch_ramp.fraction=0.5"))
    )
    assert ramped / whole == pytest.approx(0.75, abs=0.01)
    # Under a budget the hours are what they are. While the batch grows from a tiny one, steps are many and short.
    budget = ("recipe=cramming", "micro_batch_size=128")
    steps = [
        int(line_of(capsys, "run", *budget, *ramp).split()[1].replace(",", ""))
        for ramp in ((), ("batch_ramp.start=null",))
    ]
    expected = 0.4 + sum(0.6 / 63 * 64 / multiple for multiple in range(1, 64))
    assert steps[0] / steps[1] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "kernel", "peak"),
    [
        (("model=base",), "varlen", 989),
        (("model=base", "precision=fp32"), "sdpa", 67),
        (("model=base", "model.attention=flash"), "flash", 989),
    ],
)
def test_the_kernel_and_the_peak_of_the_precision(
    arguments: tuple[str, ...], kernel: str, peak: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line_of(capsys, "model", *arguments).endswith(f"; attention by {kernel}")
    assert f"of {peak} TFLOP/s" in line_of(capsys, "speed", *arguments)


def test_the_table_leaves_out_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["model=base", "precision=fp16", "compile=true"])
    _, _, table = capsys.readouterr().out.partition("\nzero ")
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["0", "1", "2", "2_offload"]


def test_the_corpus_knows_better(corpus: Path) -> None:
    _, options = composed([f"data.path={corpus}", "vocab_size=99", "max_len=512"])
    manifest = read_manifest(corpus)
    assert (options.vocab_size, options.max_len) == (61, manifest.max_len)
    assert options.mean_len == round(manifest.splits["pass-00"].tokens / manifest.splits["pass-00"].samples)


def test_what_cannot_fit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["recipe=bert_2018", "gpu=rtx4090", "micro_batch_size=256"]) == 64
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"error: micro_batch_size=256: with zero=1 this needs about \d+ GiB of a GPU[^\n]*\n", printed.err
    )
    assert "largest mb" in printed.out  # the table came first


def test_training_refuses_what_cannot_fit(corpus: Path) -> None:
    options, config = corpus_options(plan.DEFAULTS, read_manifest(corpus)), config_of(small())
    assert options.masking <= 0.15
    check_memory(config, options, 10_000, 1, available_gib=2)
    with pytest.raises(UserError, match=r"python -m pretrain\.plan shows what fits"):
        check_memory(config, options, 400_000_000, 1, available_gib=2)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("gpu=h300", "gpu=h300: there are b200, h200"),
        ("gpus=0", "gpus=0: must be at least 1"),
        ("gpus=x", "gpus=x: is not a whole number"),
        ("mfu=1.5", "mfu=1.5: must be in"),
        ("gpus=3", "not a multiple of micro_batch_size=32 x 3 ranks"),
        ("gpus", "gpus: not a key=value"),
        ("--multirun", "--multirun: not a key=value"),
        ("steps=1=2", "steps=1=2: not a key=value"),
        ("batch_ramp.start=16", "global_batch_size=16: not a multiple of micro_batch_size=32"),
        ("max_len=1024", "model.max_positions=512: shorter than"),
        ("mean_len=1000", "mean_len=1000: must be at most max_len=128"),
        ("data.path=/typo", "/typo/manifest.json: not there"),
        ("model.attention=cpu", "model.attention=cpu: the model is on a GPU"),
    ],
)
def test_bad_keys_are_one_line(argument: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([argument]) == 64
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_curves_are_drawn_where_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    curves = ["model.dropout=[[0,0.2],[1,0]]", "loss.nsp_weight=[[0,1],[1,1]]", "optim.lr=[[0,0],[0.5,1e-3],[1,0]]"]
    batch = ["global_batch_size=[[0,64],[1,256]]", "steps=1000"]
    assert plan.main([*curves, *batch, "model=tiny"]) == 0
    out = capsys.readouterr().out
    schedule, *drawn = [line.split(maxsplit=2)[1:] for line in out.splitlines() if line.startswith(("sched", "curve"))]
    assert schedule[0][0] == schedule[0][-1] == "▁"
    assert "█" in schedule[0]
    assert schedule[1] == "0 to 0, at most 0.001, as optim.lr says"
    assert [told for _, told in drawn] == ["64 to 256: global_batch_size", "0.2 to 0: model.dropout"]
    assert drawn[0][0][-1] == drawn[1][0][0] == "█"
    assert "batch       256 = 1 h200" in out


def test_the_schedule_is_drawn_from_its_first_step_to_its_last() -> None:
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", "schedule.warmup_fraction=0.5"])
    bars = draw_schedule(config, 1000, columns=9).split()[0]
    assert bars[0] == bars[-1] == "▁"
    assert bars[4] == "█"
    assert list(bars[:5]) == sorted(bars[:5])
    assert list(bars[4:]) == sorted(bars[4:], reverse=True)


@pytest.mark.parametrize("vocabulary", [30_522, 262_144])
def test_what_the_head_costs(vocabulary: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=base", f"vocab_size={vocabulary}", "micro_batch_size=64", "zero=0", "precision=bf16"]
    line = line_of(capsys, "head", *arguments)
    config, options = composed(arguments)
    multiple, masked = config.model.pad_vocab_to, round(64 * 128 * 0.15)
    rows, count = -(-vocabulary // multiple) * multiple, parameters_of(config.model, vocabulary)
    assert f"{rows:,} x 768 weights are {rows * 768 / count:.0%} of the model" in line
    step = plan.stretch_of(*plan.by_phase(config, options)[0], rows, 1.0)
    assert f"takes {6 * round(256 * 128 * 0.15) * 768 * rows / step.flops:.0%} of a step's FLOPs" in line
    told = float(re.findall(r"its logits ([\d.]+) GiB", line)[0])
    assert told == pytest.approx((2 * rows * masked + 8 * min(rows * masked, 2**27)) / 2**30, abs=0.006)


def test_a_mixture_and_phases_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, samples, length in (("en", 120, 24), ("de", 20, 24), ("long", 50, 48)):
        make_corpus(tmp_path / name, samples=samples, max_len=length)
    mixture = f"[{{path:{tmp_path}/en,weight:[[0,0.8],[1,0.2]]}},{{path:{tmp_path}/de,weight:[[0,0.2],[1,0.8]]}}]"
    phases = f"phases=[{{from:0.75,data.path:{tmp_path}/long,global_batch_size:8,micro_batch_size:8}}]"
    given = ["model=tiny", "global_batch_size=16", "micro_batch_size=16", "steps=20", f"data.mixture={mixture}"]
    assert plan.main([*given, phases]) == 0
    out = capsys.readouterr().out
    en, de = [line for line in out.splitlines() if line.startswith("mixture")]
    assert en.endswith("80% to 20%: en, 1 epochs")  # half of 15 steps of 16 samples
    assert de.endswith("20% to 80%: de, 6 epochs")
    (phase,) = [line for line in out.splitlines() if line.startswith("phase")]
    assert phase.startswith("phase 2     from step 15: 8 samples of ")
    assert "curve " in out
    lengths = [composed([f"data.path={tmp_path}/{name}"])[1].mean_len for name in ("en", "de", "long")]
    mean = round((lengths[0] + lengths[1]) / 2)
    tokens = 15 * 16 * mean + 5 * 8 * lengths[2]
    assert f"run         20 steps, {tokens / 1e9:,.1f} G tokens" in out
    assert plan.main([*given, phases, "tokens=1M", "gpu=cpu"]) == 0
    steps = int(re.findall(r"run +([\d,]+) steps", capsys.readouterr().out)[0].replace(",", ""))
    assert steps == pytest.approx(1e6 / (tokens / 20), rel=0.01)
