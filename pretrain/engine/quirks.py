"""What Cloze changes in DeepSpeed, or reads where DeepSpeed offers no other way: a function for each, and only here.

Every function says why, and checks what it relies on each time it is called at start-up: a release of DeepSpeed in
which that is otherwise stops the run with one line, instead of training wrongly. `QUIRKS` lists them by name with the
version in which they were seen.
"""

import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from cloze.errors import UserError, first_line
from pretrain.checkpoint import LossScale
from pretrain.optim.sharded import Partition

P = ParamSpec("P")
R = TypeVar("R")
QUIRKS: dict[str, str] = {}
_OTHERWISE = (AttributeError, ImportError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


class _Changed(Exception):
    """Something that a quirk relies on is no longer so."""


def quirk(seen_in: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function that reaches into DeepSpeed `seen_in`; where it cannot, that is one line for the user."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        QUIRKS[name] = seen_in

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (_Changed, *_OTHERWISE) as error:
                raise UserError(
                    f"deepspeed {importlib.metadata.version('deepspeed')}: differs from {seen_in} in what Cloze relies "
                    f"on ({name}: {first_line(error)}); install deepspeed=={seen_in}"
                ) from error

        return guarded

    return register


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Changed(otherwise)


@quirk("0.19.8")
def disable_shared_memory_collectives() -> None:
    """Its shared-memory collectives for CPUs would be compiled at start-up, and crash where there is no compiler."""
    from deepspeed import ops

    its_collectives = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch itself by that name

    name = "deepspeed_shm_comm"
    _expect(name in ops.__compatible_ops__, f"no operator {name}")
    _expect("__compatible_ops__" in inspect.getsource(its_collectives), "its collectives do not look at that list")
    ops.__compatible_ops__[name] = False


@quirk("0.19.8")
def keep_one_optimizer_layout() -> None:
    """Stage 1 in bf16 with sums in fp32 would get an optimizer of another layout than the other stages.

    That one all-reduces every gradient in fp32; the one for fp16 accumulates in fp32 too, and is what all others get.
    """
    from deepspeed.runtime import engine as its_engine

    chooses = its_engine.DeepSpeedEngine._do_optimizer_sanity_check.__code__.co_names
    _expect({"BFLOAT16", "ZERO_OPTIMIZATION"} <= {*chooses}, "it chooses its optimizers by other names")
    its_engine.BFLOAT16 = its_engine.ZERO_OPTIMIZATION


@quirk("0.19.8")
def announce_optimizers(kinds: Sequence[type[torch.optim.Optimizer]]) -> None:
    """It warns of optimizers under ZeRO that are not in a list of its own."""
    from deepspeed.runtime.zero import utils

    listed = utils.ZERO_SUPPORTED_OPTIMIZERS
    _expect("ZERO_SUPPORTED_OPTIMIZERS" in utils.is_zero_supported_optimizer.__code__.co_names, "it has another list")
    listed.extend(kind for kind in kinds if kind not in listed)


@quirk("0.19.8")
def check_plain_optimizer(its_engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Stage 0 steps our optimizer itself, without clipping and whether gradients are finite or not.

    So the check for NaN, clipping and the loss scale are ours there, in a hook before the optimizer's step.
    """
    _expect(its_engine.optimizer is optimizer, f"it wraps the optimizer in {type(its_engine.optimizer).__name__}")
    _expect(its_engine.gradient_clipping() == 0, "it clips gradients itself")


@quirk("0.19.8")
def skip_reduction(its_engine: Any) -> None:
    """At stage 0 gradients are joined in a buffer, reduced over the ranks and taken apart again, of one rank, too."""
    _expect(its_engine.enable_backward_allreduce is True, "enable_backward_allreduce is not what it was")
    _expect(its_engine.dp_world_size == 1, "there are other ranks")
    its_engine.enable_backward_allreduce = False


@quirk("0.19.8")
def create_loss_scaler(its_engine: Any) -> Any:
    """Stage 0 has no loss scaler: make the one that it makes for the other stages, from `deepspeed.extra.fp16`."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    options = its_engine._config.float16_config
    return CreateLossScaler(torch.half, options.loss_scale, options.loss_scale == 0, options.dynamic_loss_scale_args())


@quirk("0.19.8")
def soften_loss_scaler(scaler: Any) -> Any:
    """At its smallest scale it would raise a bare Exception: the loop counts skipped steps and says what to do."""
    _expect(callable(scaler.update_scale) and float(scaler.loss_scale) > 0, "it has no scale")
    if scaler.dynamic:
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "raise_error_at_min_scale")
        missing = [name for name in names if not hasattr(scaler, name)]
        _expect(not missing, f"its loss scaler has no {', '.join(missing)}")
        scaler.raise_error_at_min_scale = False
    return scaler


@quirk("0.19.8")
def read_loss_scale(scaler: Any) -> LossScale:
    """It saves its scale only in checkpoints of its own."""
    if not scaler.dynamic:
        return LossScale(value=float(scaler.loss_scale))
    steady = scaler.cur_iter - scaler.last_overflow_iter - 1
    return LossScale(value=float(scaler.cur_scale), steady_steps=steady, hysteresis=scaler.cur_hysteresis)


@quirk("0.19.8")
def write_loss_scale(scaler: Any, scale: LossScale) -> None:
    """The other direction; a scale that does not move is the configuration's."""
    if scaler.dynamic:
        scaler.cur_scale, scaler.cur_hysteresis = scale.value, scale.hysteresis
        scaler.cur_iter, scaler.last_overflow_iter = scale.steady_steps, -1
        _expect(read_loss_scale(scaler) == scale, "its loss scaler does not keep what it is given")


@quirk("0.19.8")
def drop_gradients_of_skipped_step(zero: Any) -> None:
    """Stage 2, offloaded, would add the next gradients to those of a step that was skipped."""
    sums = zero.averaged_gradients
    _expect(isinstance(sums, dict), "its sums of gradients are no dict")
    sums.update(dict.fromkeys(sums))


@quirk("0.19.8")
def whole_shape(parameter: Any, stage: int) -> torch.Size:
    """At stage 3 the parameter itself is empty."""
    shape: torch.Size = parameter.ds_shape if stage == 3 else parameter.shape
    return shape


@quirk("0.19.8")
def stays_whole(parameter: Any) -> bool:
    """Stage 3 keeps parameters below a threshold whole on every rank, and gathers them after each step."""
    return bool(parameter.ds_persist) and parameter.numel() == parameter.ds_numel


@quirk("0.19.8")
def partition_of_flat_group(parameter: Any, optimizer: torch.optim.Optimizer) -> Partition | None:
    """Stages 1 and 2 flatten a whole group of parameters and cut that. None: no element is on this rank."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    _expect(inside.numel == whole.numel, "a part has not the same length in both precisions")
    return Partition(flat, inside.start, whole.start, whole.numel)


@quirk("0.19.8")
def partition_of_parameter(parameter: Any, zero: Any, rank: int) -> Partition | None:
    """Stage 3 cuts each parameter, and puts the parts of a group side by side. None: this rank's is all padding."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(rank * size, parameter.ds_numel)  # the last part is padded
    length = min(size, parameter.ds_numel - start)
    return Partition(zero.fp32_partitioned_groups_flat[group], offset, start, length) if length else None


@quirk("0.19.8")
def check_partition(parameter: Any, partition: Partition, stage: int) -> None:
    """Before the first step the fp32 weights of a partition are those that the model computes with."""
    _expect(partition.tensor.dtype == torch.float32, f"it updates weights in {partition.tensor.dtype}")
    mine = partition.of(partition.tensor.detach())
    if stage == 3:
        computed: Tensor = parameter.ds_tensor.detach().view(-1)[: partition.length]
    else:
        computed = parameter.detach().view(-1)[partition.start : partition.start + partition.length]
    same = torch.allclose(mine.to(computed.device, computed.dtype), computed, rtol=0.0, atol=0.0, equal_nan=True)
    _expect(same, "weights lie elsewhere than it says")
