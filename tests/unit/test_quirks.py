"""What Cloze relies on inside DeepSpeed and torch: it holds in the releases that are installed, and where it does not,
training stops with one line that names the quirk."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed import ops
from deepspeed.runtime import engine as its_engine
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero import utils
from torch import distributed, nn

from cloze import cli
from cloze.errors import UserError
from pretrain.checkpoint import LossScale
from pretrain.config import TrainConfig, ZeroStage
from pretrain.data.loader import MicroBatch
from pretrain.dist import Process
from pretrain.engine import quirks
from pretrain.engine.engine import Engine
from pretrain.model import torch_private
from pretrain.optim.lamb import Lamb
from tests.support import free_port

BASE = cli.compose(
    "train", TrainConfig, ["run=r", "data.path=d", "global_batch_size=4", "micro_batch_size=4", "precision=bf16"]
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # DeepSpeed's and torch's


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    kept = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    distributed.init_process_group("gloo")
    yield
    distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(kept)


def engine_of(zero: str) -> Engine:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            raise NotImplementedError

    torch.manual_seed(1)
    assert isinstance(distributed.group.WORLD, distributed.ProcessGroup)
    process = Process(0, 1, 0, torch.device("cpu"), distributed.group.WORLD)
    return Engine(Two(), replace(BASE, zero=ZeroStage(zero)), process)


def stops_naming(name: str, action: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=rf"^deepspeed .*: differs from .*\({name}: .*; install deepspeed==") as caught:
        action()
    assert "\n" not in str(caught.value)


def test_shared_memory_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    quirks.disable_shared_memory_collectives()
    assert ops.__compatible_ops__["deepspeed_shm_comm"] is False
    monkeypatch.setattr(ops, "__compatible_ops__", {"another": True})
    stops_naming("disable_shared_memory_collectives", quirks.disable_shared_memory_collectives)


def test_one_optimizer_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    quirks.keep_one_optimizer_layout()
    assert its_engine.BFLOAT16 == its_engine.ZERO_OPTIMIZATION
    monkeypatch.setattr(its_engine.DeepSpeedEngine, "_do_optimizer_sanity_check", lambda self, optimizer: "bf16")
    stops_naming("keep_one_optimizer_layout", quirks.keep_one_optimizer_layout)


def test_announced_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    quirks.announce_optimizers([Lamb])
    assert Lamb in utils.ZERO_SUPPORTED_OPTIMIZERS
    monkeypatch.setattr(utils, "is_zero_supported_optimizer", lambda optimizer: True)
    stops_naming("announce_optimizers", lambda: quirks.announce_optimizers([Lamb]))


def test_plain_optimizer_at_stage_0(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("0")
    quirks.check_plain_optimizer(engine._deepspeed, engine._inner)
    monkeypatch.setattr(type(engine._deepspeed), "gradient_clipping", lambda self: 1.0)
    stops_naming("check_plain_optimizer", lambda: quirks.check_plain_optimizer(engine._deepspeed, engine._inner))
    stops_naming("check_plain_optimizer", lambda: quirks.check_plain_optimizer(engine._deepspeed, object()))


def test_no_reduction_over_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("0")._deepspeed
    assert engine.enable_backward_allreduce is False
    monkeypatch.setattr(engine, "buffered_allreduce_fallback", lambda **given: pytest.fail("reduced"))
    engine.set_gradient_accumulation_boundary(True)
    engine._backward_epilogue()
    stops_naming("skip_reduction", lambda: quirks.skip_reduction(engine))
    engine.enable_backward_allreduce, engine.dp_world_size = True, 2
    stops_naming("skip_reduction", lambda: quirks.skip_reduction(engine))


def test_loss_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("0")
    scaler = quirks.soften_loss_scaler(quirks.create_loss_scaler(engine._deepspeed))
    assert isinstance(scaler, loss_scaler.DynamicLossScaler)
    assert not scaler.raise_error_at_min_scale
    scale = LossScale(value=512.0, steady_steps=7, hysteresis=2)
    quirks.write_loss_scale(scaler, scale)
    assert quirks.read_loss_scale(scaler) == scale
    assert scaler.loss_scale == 512.0
    for _ in range(2 * scaler.cur_hysteresis):
        scaler.update_scale(True)
    assert scaler.loss_scale < 512.0, "the scale that it uses is not the one that is read and written"
    assert quirks.read_loss_scale(scaler).value == scaler.loss_scale

    fixed = SimpleNamespace(dynamic=False, loss_scale=8.0)
    assert quirks.read_loss_scale(fixed) == LossScale(value=8.0)
    other = SimpleNamespace(dynamic=True, loss_scale=8.0, update_scale=print)
    stops_naming("soften_loss_scaler", lambda: quirks.soften_loss_scaler(other))
    stops_naming("read_loss_scale", lambda: quirks.read_loss_scale(other))
    monkeypatch.setattr(
        type(scaler), "cur_hysteresis", property(lambda self: 1, lambda self, value: None), raising=False
    )
    stops_naming("write_loss_scale", lambda: quirks.write_loss_scale(scaler, scale))
    monkeypatch.delattr(loss_scaler, "CreateLossScaler")
    stops_naming("create_loss_scaler", lambda: quirks.create_loss_scaler(engine._deepspeed))


def test_gradients_of_a_skipped_step() -> None:
    zero = engine_of("2_offload")._deepspeed.optimizer
    zero.averaged_gradients[0] = [torch.ones(3)]
    quirks.drop_gradients_of_skipped_step(zero)
    assert zero.averaged_gradients[0] is None
    zero.averaged_gradients = [None]
    stops_naming("drop_gradients_of_skipped_step", lambda: quirks.drop_gradients_of_skipped_step(zero))


@pytest.mark.parametrize("zero", ["1", "2", "3", "2_offload", "3_offload"])
def test_partitions(zero: str) -> None:
    """One rank has all of every parameter."""
    engine = engine_of(zero)
    shapes = {"first.weight": (5, 3), "first.bias": (5,), "second.weight": (2, 5), "second.bias": (2,)}
    assert {name: tuple(shape) for name, shape in engine.shapes.items()} == shapes
    assert [(part.start, part.length) for part in engine._partitions.values()] == [(0, 15), (0, 5), (0, 10), (0, 2)]
    torch.manual_seed(1)
    assert torch.equal(engine._values(engine._partitions[0], "weight"), nn.Linear(3, 5).weight.bfloat16().flatten())


@pytest.mark.parametrize("zero", ["1", "2", "2_offload"])
def test_partitions_that_are_not_where_they_were(zero: str) -> None:
    engine = engine_of(zero)
    parameter, partition = engine._deepspeed.module.first.weight, engine._partitions[0]
    quirks.check_partition(parameter, partition, engine.stage)
    wrong = partition._replace(offset=partition.offset + 1)
    stops_naming("check_partition", lambda: quirks.check_partition(parameter, wrong, engine.stage))
    mapping = parameter._hp_mapping
    parameter._hp_mapping = SimpleNamespace(param_group_index=mapping.param_group_index)
    stops_naming("partition_of_flat_group", lambda: quirks.partition_of_flat_group(parameter, engine._inner))
    del parameter._hp_mapping
    stops_naming("partition_of_flat_group", lambda: quirks.partition_of_flat_group(parameter, engine._inner))


@pytest.mark.parametrize("zero", ["3", "3_offload"])
def test_partitions_of_stage_3_that_are_not_where_they_were(zero: str) -> None:
    engine = engine_of(zero)
    parameter, partition, its = (
        engine._deepspeed.module.first.weight,
        engine._partitions[0],
        engine._deepspeed.optimizer,
    )
    quirks.check_partition(parameter, partition, 3)
    wrong = partition._replace(offset=partition.offset + 1)
    stops_naming("check_partition", lambda: quirks.check_partition(parameter, wrong, 3))
    for name in ("grad_position", "get_param_id", "fp32_partitioned_groups_flat"):
        kept = {key: getattr(its, key) for key in ("grad_position", "get_param_id", "fp32_partitioned_groups_flat")}
        del kept[name]
        twin = SimpleNamespace(**kept)
        stops_naming("partition_of_parameter", lambda twin=twin: quirks.partition_of_parameter(parameter, twin, 0))
    del parameter.ds_shape
    stops_naming("whole_shape", lambda: quirks.whole_shape(parameter, 3))
    del parameter.ds_persist
    stops_naming("stays_whole", lambda: quirks.stays_whole(parameter))


def test_an_engine_does_not_start_where_weights_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    partition_of = quirks.partition_of_flat_group
    monkeypatch.setattr(
        quirks, "partition_of_flat_group", lambda *given: (found := partition_of(*given)) and found._replace(offset=0)
    )
    stops_naming("check_partition", lambda: engine_of("1"))


def test_every_quirk_is_broken_here() -> None:
    assert {*re.findall(r'stops_naming\(\s*"(\w+)"', Path(__file__).read_text())} == {*quirks.QUIRKS}
    assert all(re.fullmatch(r"0\.19\.[0-9]+", version) for version in quirks.QUIRKS.values())


def broken_flash(**changes: Any) -> SimpleNamespace:
    """torch's namespace of operators with another schema of flash attention."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    arguments = [
        SimpleNamespace(
            name=one.name,
            type=changes.get(one.name, one.type),
            has_default_value=lambda one=one: one.has_default_value(),
        )
        for one in schema.arguments
        if changes.get(one.name, "") is not None
    ]
    overload = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
    return SimpleNamespace(_flash_attention_forward=SimpleNamespace(overloads=lambda: ["default"], default=overload))


@pytest.mark.parametrize("twin", [broken_flash(scale=None), broken_flash(max_q="Tensor"), SimpleNamespace()])
def test_flash_attention_of_another_torch(twin: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    check = torch_private.check_flash_attention.__wrapped__
    check()
    monkeypatch.setattr(torch.ops, "aten", twin)
    with pytest.raises(UserError, match=r"^torch .*: its _flash_attention_forward.*; use model.attention=") as caught:
        check()
    assert "\n" not in str(caught.value)
