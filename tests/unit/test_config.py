"""The schema of conf/train.yaml: every option composes, every bad value is one line, batch arithmetic helps."""

import importlib
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloze import cli
from cloze.corpus.manifest import read_manifest
from cloze.errors import UserError
from cloze.schema import doc
from pretrain.config import (
    BatchRampConfig,
    Identity,
    Precision,
    TrainConfig,
    ZeroStage,
    accumulation_steps,
    as_data,
    batch_size,
    check_ranks,
    total_samples,
)
from pretrain.curriculum import Curriculum
from pretrain.optim.optimizer import ParameterGroups, build_optimizer
from pretrain.optim.options import OptimConfig
from pretrain.optim.schedules import ScheduleConfig
from pretrain.phases import phases_of
from tests.support import ROOT

BASE = cli.compose("train", TrainConfig, ["run=r", "data.path=d"])
OPTIONS = [
    (group, path.stem)
    for group in sorted({field.name for field in fields(TrainConfig)} | {"recipe"})
    for path in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


OWNERS = {  # what only some kinds have
    "optim__momentum": "optim=muon", "optim__bias_correction": "optim=lamb", "schedule__power": "schedule=polynomial",
    "schedule__decay_fraction": "schedule=wsd",
}  # fmt: skip


def changed(**values: Any) -> TrainConfig:
    """`BASE` with dotted keys replaced (a double underscore is the dot), by the way a saved config.yaml comes in."""
    owners = [owner for name in values if (owner := OWNERS.get(name))]
    base = cli.compose("train", TrainConfig, ["run=r", "data.path=d", *owners])
    tree: dict[str, Any] = as_data(asdict(base))
    for name, value in values.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        assert leaf in node
        node[leaf] = value
    return cli.typed(tree, TrainConfig)


def test_a_saved_configuration_comes_back() -> None:
    assert changed() == BASE


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", "init_from=x", f"{group}={option}"])
    if group == "model":
        assert config.model.name == option


@pytest.mark.parametrize(
    ("name", "layers", "hidden"),
    [("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512), ("base", 12, 768), ("large", 24, 1024)],
)
def test_models_have_the_published_sizes(name: str, layers: int, hidden: int) -> None:
    model = cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"model={name}"]).model
    assert (model.num_layers, model.hidden_size) == (layers, hidden)
    assert (model.num_heads, model.intermediate_size, model.max_positions) == (hidden // 64, 4 * hidden, 512)


def test_dropout_of_a_model_is_one_override() -> None:
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", "model=tiny", "model.dropout=0.25"])
    assert config.model.dropout == 0.25


def test_compiled_layers_and_zero_3_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"compile=true: not with zero=3, .*; use zero=1 or 2, or compile=false"):
        changed(compile=True, zero="3")


NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any]] = [
    *(("run", name) for name in ("", ".", "..", "a/b", "../x", "/tmp/x", "a\\b", "a\0b", "a\nb")),
    *(("seed", value) for value in (-1, 2**63)),
    *(("zero", value) for value in (-1, 4, "1_offload", "offload")),
    *((key, value) for key in ("global_batch_size", "micro_batch_size", "steps", "stop_at") for value in (0, -3)),
    ("precision", "fp8"),
    ("steps", 1.5),
    ("steps", "many"),
    ("steps", None),
    ("data__path", None),
    ("data__workers", -1),
    ("data__prefetch", 0),
    *((f"model__{key}", 0) for key in ("hidden_size", "num_layers", "num_heads", "max_positions", "pad_vocab_to")),
    ("model__num_heads", 7),
    *((f"model__{key}", value) for key in ("dropout", "attention_dropout") for value in (-0.1, 1.0, NAN)),
    ("model__attention", "fast"),
    ("model__architecture", "gpt"),
    *((f"optim__{key}", value) for key in ("lr", "eps", "weight_decay", "clip") for value in (-1e-9, NAN)),
    *((f"optim__{key}", INF) for key in ("lr", "eps", "weight_decay")),
    *((f"optim__{key}", value) for key in ("beta1", "beta2", "momentum") for value in (-0.1, 1.0, NAN)),
    ("optim__max_skipped_steps", 0),
    ("optim__eps", 0.0),
    ("optim__kind", "sgd"),
    *(
        (f"schedule__{key}", value)
        for key in ("warmup_fraction", "start_fraction", "final_fraction", "decay_fraction")
        for value in (-0.1, 1.1, NAN)
    ),
    *(("schedule__power", value) for value in (0, -1, INF, NAN)),
    ("schedule__kind", "triangle"),
    *((f"loss__{key}", value) for key in ("mlm_weight", "nsp_weight", "z_loss_weight") for value in (-1.0, NAN, INF)),
    *(("global_batch_size", value) for value in (8.5, [[0, 8], [1, 16.5]], [[0, 0], [1, 8]], "many")),
    *(
        (f"data__{key}", value)
        for key in ("masking_probability", "mask_share", "random_share")
        for value in (-0.1, 1.1)
    ),
    *(("data__masking_probability", value) for value in (0, [[0, 0.2], [1, 0]])),
    ("data__random_share", [[0, 0.1], [0.5, 0.3], [0.5, 0.1]]),
    *((f"model__{key}", [[0, 0.1], [1, 1.0]]) for key in ("dropout", "attention_dropout")),
    *((key, [[0.5, 1], [0.4, 2]]) for key in ("optim__lr", "loss__nsp_weight", "model__dropout", "global_batch_size")),
    ("model__distance_bias", [[0, -1], [1, 0]]),
    ("batch_ramp__start", 0),
    ("batch_ramp__start", 3),
    *(("batch_ramp__fraction", value) for value in (0, 1.1, NAN)),
    ("log__every", 0),
    ("eval__every", -1),
    ("eval__max_samples", -1),
    *((f"checkpoint__{key}", -1) for key in ("every", "keep_last", "keep_every")),
    ("checkpoint__keep_last", 0),
    *(("checkpoint__at", [value]) for value in (0.0, -0.5, 1.01, NAN)),
    ("watchdog__seconds", -1),
    ("wandb__mode", "loud"),
    ("wandb__tags", "one"),
    ("deepspeed__extra", 3),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{key}={value!r}" for key, value in BAD])
def test_a_bad_value_is_one_line_that_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        changed(**{key: value})
    message = str(caught.value)
    assert "\n" not in message
    group, _, leaf = key.partition("__")
    assert leaf in message or message.startswith(group)
    assert group in message


def test_both_weights_zero() -> None:
    with pytest.raises(UserError, match="nothing to learn"):
        changed(loss__mlm_weight=0, loss__nsp_weight=0)


def test_weights_that_are_both_zero_for_a_while() -> None:
    with pytest.raises(UserError, match=r"both weights are 0 at 0\.25 of the run, there is nothing to learn"):
        changed(loss__mlm_weight=[[0, 1], [0.25, 0], [0.75, 0]], loss__nsp_weight=[[0.25, 0], [0.75, 0], [0.75, 1]])
    config = changed(loss__mlm_weight=[[0, 1], [0.5, 0]], loss__nsp_weight=[[0.25, 0], [1, 1]])
    found = Curriculum(phases_of(config)[0]).loss(total_samples(config) // 4)
    assert (found.mlm_weight, found.nsp_weight) == (0.5, 0)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"optim__lr": [[0, 1], [1, 0]], "budget__hours": 1.0},
            "optim.lr: a curve stretches over the samples of a run",
        ),
        ({"model__dropout": [[0, 0.1], [1, 0]], "compile": True}, "model.dropout: a curve, and compile=true builds"),
        (
            {"global_batch_size": [[0, 8], [1, 16]], "batch_ramp__start": 8},
            "batch_ramp.start=8: global_batch_size is a",
        ),
        (
            {"model__attention": "flex", "model__attention_dropout": [[0, 0], [1, 0.1]]},
            "model.attention=flex: knows no",
        ),
    ],
)
def test_what_a_curve_does_not_go_with(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(**values)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_values_at_the_edge_are_fine() -> None:
    assert changed(seed=2**63 - 1, optim__lr=0, optim__clip=0, stop_at=None, run="a.b-c_d").seed == 2**63 - 1
    assert changed(precision="fp16").precision is Precision.fp16


# Batch arithmetic


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 50), st.integers(1, 120))
def test_the_batch_grows_evenly(start: int, multiples: int, ramp_steps: int, steps: int) -> None:
    tree = {"steps": steps, "global_batch_size": start * multiples}
    ramp_steps = min(ramp_steps, steps)
    config = replace(BASE, **tree, batch_ramp=BatchRampConfig(start=start, fraction=ramp_steps / steps))
    sizes = [batch_size(step / steps, config) for step in range(steps)]
    assert sizes[0] == start
    assert all(size % start == 0 for size in sizes)
    assert sizes == sorted(sizes)
    assert set(sizes[ramp_steps:]) <= {start * multiples}
    for step, size in enumerate(sizes[:ramp_steps]):  # within one multiple of the straight line
        assert -1e-6 <= start + step * (start * multiples - start) / ramp_steps - size < start
    assert total_samples(config) == sum(sizes)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=2, max_size=4),
    st.integers(1, 8),
    st.integers(20, 200),
)
def test_a_curve_of_batch_sizes(points: list[tuple[float, int]], unit: int, steps: int) -> None:
    """Multiples of one unit below the curve, of the samples alone, whose steps consume about the run's samples."""
    curve = [[share, size * unit] for share, size in sorted(points)]
    config = replace(BASE, steps=steps, global_batch_size=curve)
    total, samples, sizes = total_samples(config), 0, []
    for _ in range(steps):
        sizes.append(batch_size(min(1.0, samples / total), config))
        exact = config.batch_sizes.at(min(1.0, samples / total))
        assert 0 <= exact + 1e-6 - sizes[-1] < config.batch_unit + 1e-5
        samples += sizes[-1]
    assert all(size % unit == 0 for size in sizes)
    jumps = sum(abs(a[1] - b[1]) for a, b in pairwise(curve))
    assert abs(total - samples) <= max(sizes) + jumps + total / 500


def test_the_unit_of_a_batch_curve_holds_every_rank() -> None:
    config = replace(BASE, global_batch_size=[[0, 64], [1, 160]], micro_batch_size=16)
    assert config.batch_unit == 32
    check_ranks(config, 2)
    with pytest.raises(
        UserError, match=r"global_batch_size: grows in steps of 32, .* no multiple of .*=16 x 4 ranks = 64"
    ):
        check_ranks(config, 4)


def test_another_ramp_is_another_run(corpus: Path) -> None:
    """Close ones, too: their batches differ."""
    manifest = read_manifest(corpus)

    def ramp(start: int | None, fraction: float) -> str:
        config = replace(BASE, batch_ramp=BatchRampConfig(start=start, fraction=fraction))
        return Identity.of(config, manifest, "").batch_ramp

    assert len({ramp(4, 0.1), ramp(8, 0.1), ramp(4, 0.101), ramp(4, 0.1001), ramp(None, 0.1)}) == 5
    assert ramp(None, 0.1) == ramp(None, 0.2)
    curves = [Identity.of(replace(BASE, global_batch_size=[[0, 8], [at, 16]]), manifest, "") for at in (0.5, 0.6)]
    assert len({curve.batch_ramp for curve in curves}) == 2
    assert {curve.global_batch_size for curve in curves} == {16}


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 5_000), st.integers(1, 600), st.integers(1, 70))
def test_accumulation_or_the_nearest_sizes_that_divide(batch: int, micro: int, world: int) -> None:
    if batch % (micro * world) == 0:
        assert accumulation_steps(batch, micro, world) * micro * world == batch
        return
    with pytest.raises(UserError) as caught:
        accumulation_steps(batch, micro, world)
    message = str(caught.value)
    assert message.startswith(f"global_batch_size={batch}: not a multiple of micro_batch_size={micro} x {world} rank")
    assert "\n" not in message
    hint = message.partition("; ")[2]
    batches = re.search(r"global_batch_size ([0-9]+)(?: or ([0-9]+))?", hint)
    assert batches
    offered = [int(number) for number in batches.groups() if number]
    assert all(accumulation_steps(size, micro, world) for size in offered)
    nearest = min(
        (size for size in range(micro * world, batch + micro * world + 1, micro * world)), key=lambda s: abs(s - batch)
    )
    assert abs(nearest - batch) == min(abs(size - batch) for size in offered)
    micros = re.search(r"micro_batch_size ([0-9]+)", hint)
    assert bool(micros) == (batch % world == 0)
    if micros:
        assert accumulation_steps(batch, int(micros[1]), world)
        valid = [size for size in range(1, batch + 1) if batch % (size * world) == 0]
        assert abs(int(micros[1]) - micro) == min(abs(size - micro) for size in valid)


def test_nothing_outside_conf_holds_a_default() -> None:
    """A missing key is said, never filled in."""
    for field in fields(TrainConfig):
        tree = as_data(asdict(BASE))
        del tree[field.name]
        with pytest.raises(UserError) as caught:
            cli.typed(tree, TrainConfig)
        assert "\n" not in str(caught.value)
        assert field.name in str(caught.value)


def test_conf_is_where_the_package_looks() -> None:
    assert (Path(ROOT) / "conf" / "train.yaml").is_file()
    assert {"model", "optim", "schedule"} <= {group for group, _ in OPTIONS}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.momentum=0.9", "optim.momentum: of no use to optim=adamw, whose keys are "),
        ("optim.bias_correction=false", "optim.bias_correction: of no use to optim=adamw, whose keys are "),
        ("schedule.power=2", "schedule.power: of no use to schedule=linear, whose keys are "),
        ("schedule.decay_fraction=0.2", "schedule.decay_fraction: of no use to schedule=linear, whose keys are "),
    ],
)
def test_a_variant_owns_its_keys(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.compose("train", TrainConfig, ["run=r", "data.path=d", override])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw", "lamb", "muon"])
def test_help_shows_the_keys_of_the_chosen_optimizer(optim: str) -> None:
    shown = cli.help_text("train", TrainConfig, [f"optim={optim}"])
    assert ("optim.bias_correction" in shown) == (optim == "lamb")
    assert ("optim.momentum" in shown) == (optim == "muon")
    assert "optim.beta1" in shown


@pytest.mark.parametrize("spelling", ["0", "1", "2", "3", "2_offload", "3_offload"])
def test_spellings_of_zero(spelling: str) -> None:
    """On the command line, and in a saved config.yaml as text or as a number."""
    zero = cli.compose("train", TrainConfig, ["run=r", "data.path=d", f"zero={spelling}"]).zero
    assert zero is ZeroStage(spelling) is changed(zero=spelling).zero
    assert (zero.stage, zero.offload) == (int(spelling[0]), len(spelling) > 1)
    assert as_data({"zero": zero}) == {"zero": spelling}
    if not zero.offload:
        assert changed(zero=zero.stage).zero is zero


def test_an_optimizer_of_ones_own_is_a_file_and_no_list() -> None:
    """Each kind of options has a module of its name that builds it."""
    for kind in OptimConfig.kinds:
        assert callable(importlib.import_module(f"pretrain.optim.{kind}").build)
        assert (ROOT / "conf" / "optim" / f"{kind}.yaml").is_file()
        assert (ROOT / "pretrain" / "optim" / "options" / f"{kind}.py").is_file()
    for kind in ScheduleConfig.kinds:
        assert (ROOT / "conf" / "schedule" / f"{kind}.yaml").is_file()


def test_an_optimizer_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of its own, checked, and a `build`: no list names it."""
    monkeypatch.setattr(OptimConfig, "kinds", dict(OptimConfig.kinds))

    @dataclass(frozen=True, kw_only=True)
    class SgdConfig(OptimConfig, kind="sgd"):
        nesterov: bool = doc("look ahead")

    def build(config: SgdConfig, groups: ParameterGroups) -> torch.optim.Optimizer:
        groups = [groups.decayed, groups.no_decay]
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=config.nesterov)

    module = ModuleType("pretrain.optim.sgd")
    monkeypatch.setattr(module, "build", build, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tree = as_data(asdict(BASE))
    mine = {key: tree["optim"][key] for key in ("lr", "weight_decay", "clip", "max_skipped_steps")}
    tree["optim"] = {"kind": "sgd", "nesterov": True, **mine}
    config = cli.typed(tree, TrainConfig)
    assert isinstance(config.optim, SgdConfig)
    optimizer = build_optimizer(torch.nn.Linear(2, 3).named_parameters(), config.optim)
    assert [(group["nesterov"], group["weight_decay"]) for group in optimizer.param_groups] == [(True, 0.01), (True, 0)]
    tree["optim"]["beta1"] = 0.9
    with pytest.raises(UserError, match="beta1"):
        cli.typed(tree, TrainConfig)
