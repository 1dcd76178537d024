"""DeepSpeed's configuration, which only engine.py writes, and the precisions that are refused before it starts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from cloze import cli
from cloze.errors import UserError
from pretrain.config import DeepSpeedConfig as Extra
from pretrain.config import Precision, TrainConfig, ZeroStage
from pretrain.engine.engine import check_precision, check_settings, deepspeed_config

BASE = cli.compose("train", TrainConfig, ["run=r", "data.path=d"])


def config(**changes: Any) -> TrainConfig:
    extra = changes.pop("extra", None)
    return replace(BASE, deepspeed=Extra(extra=extra), **changes)


@pytest.mark.parametrize(
    ("stage", "precision"), [(s, p) for s in range(4) for p in Precision if s or p is not Precision.fp16]
)
def test_what_deepspeed_reads_is_what_we_asked(stage: int, precision: Precision) -> None:
    """Read by DeepSpeed's own parser: no key is unknown to it or misunderstood."""
    asked = deepspeed_config(
        config(zero=ZeroStage(str(stage)), precision=precision, global_batch_size=96, micro_batch_size=8), 1, 10**6
    )
    read = DeepSpeedConfig(asked)
    assert read.zero_config.stage == stage
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (96, 8, 12)
    assert read.gradient_clipping == (1.0 if stage else 0.0)  # at stage 0 the engine clips itself
    assert read.bfloat16_config.enabled == (precision is Precision.bf16 and stage > 0)
    assert read.float16_config.enabled == (precision is Precision.fp16 and stage > 0)
    assert read.optimizer_name is None
    assert read.scheduler_name is None


@pytest.mark.parametrize("clip", [0.0, 0.5, 1.0])
def test_clipping_is_always_set(clip: float) -> None:
    """DeepSpeed's default is 1.0: left out, `optim.clip=0` would clip."""
    for stage in range(4):
        asked = deepspeed_config(config(zero=ZeroStage(str(stage)), optim=replace(BASE.optim, clip=clip)), 1, 10**6)
        assert asked["gradient_clipping"] == (clip if stage else 0.0)


def test_accumulation_follows_the_world_size() -> None:
    asked = deepspeed_config(config(global_batch_size=256, micro_batch_size=16), 4, 10**6)
    assert asked["gradient_accumulation_steps"] == 4
    with pytest.raises(UserError, match="nearest"):
        deepspeed_config(config(global_batch_size=250, micro_batch_size=16), 4, 10**6)


def test_extra_adds_deep_inside() -> None:
    extra = {
        "zero_optimization": {"round_robin_gradients": True},
        "comms_logger": {"enabled": False},
        "fp16": {"initial_scale_power": 12},
    }
    before = deepspeed_config(config(zero=ZeroStage("2")), 1, 10**6)
    merged = deepspeed_config(config(zero=ZeroStage("2"), extra=extra), 1, 10**6)
    assert merged["zero_optimization"] == before["zero_optimization"] | {"round_robin_gradients": True}
    assert merged["comms_logger"] == {"enabled": False}
    assert merged["fp16"] == {"enabled": False, "initial_scale_power": 12}
    assert {key: value for key, value in merged.items() if key not in extra} == {
        key: value for key, value in before.items() if key not in extra
    }
    assert DeepSpeedConfig(merged).zero_config.round_robin_gradients


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"train_batch_size": 4}, "deepspeed.extra.train_batch_size"),
        ({"gradient_clipping": 1.0}, "deepspeed.extra.gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, "deepspeed.extra.zero_optimization.stage"),
        ({"zero_optimization": 3}, "deepspeed.extra.zero_optimization"),
        ({"bf16": {"enabled": False}}, "deepspeed.extra.bf16.enabled"),
        ({"bf16": None}, "deepspeed.extra.bf16"),
    ],
)
def test_extra_never_overrides(extra: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match="Cloze sets this key itself") as caught:
        deepspeed_config(config(zero=ZeroStage("1"), extra=extra), 1, 10**6)
    assert str(caught.value).startswith(f"{key}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("comm_logger", "comms_logger"),
        ("flop_profiler", "flops_profiler"),
        ("optimizer", None),
        ("scheduler", None),
        ("elasticity", None),
        ("xyz", None),
    ],
)
def test_a_name_that_deepspeed_would_ignore_is_refused(name: str, nearest: str | None) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(extra={name: {"enabled": True}}), 1, 10**6)
    message = str(caught.value)
    assert message.startswith(f"deepspeed.extra.{name}: not a key")
    assert "\n" not in message
    if nearest:
        assert f"did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"zero_optimization": {"bogus": 1}}, "DeepSpeedZeroConfig: bogus: Extra inputs are not permitted"),
        ({"bf16": {"bogus": 1}}, "DeepSpeedBF16Config: bogus: "),
        ({"zero_optimization": {"sub_group_size": "x"}}, "sub_group_size: Input should be a valid integer"),
        ({"checkpoint": {"tag_validation": "nix"}}, "invalid tag_validation value of NIX"),
        ({"comms_logger": 3}, "must be a mapping"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        check_settings(deepspeed_config(config(extra=extra), 1, 10**6))
    assert str(caught.value).startswith("deepspeed.extra: ")
    assert "\n" not in str(caught.value)


def test_precisions_that_cannot_be() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for stage in range(4):
        check_precision(config(zero=ZeroStage(str(stage)), precision=Precision.fp32), cpu)
        check_precision(config(zero=ZeroStage(str(stage)), precision=Precision.bf16), cpu)
        with pytest.raises(UserError, match="not possible on a CPU; use precision=bf16"):
            check_precision(config(zero=ZeroStage(str(stage)), precision=Precision.fp16), cpu)
        check_precision(config(zero=ZeroStage(str(stage)), precision=Precision.fp16), gpu)


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones emulate it, which torch counts as support unless it is asked for the real thing."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="no bfloat16"):
        check_precision(config(precision=Precision.bf16), torch.device("cuda"))
