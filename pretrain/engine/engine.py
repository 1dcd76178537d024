"""The only module that imports deepspeed: every key of its configuration and every quirk of it stays in here.

The loop sees `backward(batch)`, `step(lr)`, `evaluate(batch)`; checkpoints see fp32 weights and moments by name and
range, whatever the ZeRO stage and the number of ranks.
"""

import difflib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloze.errors import UserError
from pretrain.checkpoint import KINDS, MOMENTS, WEIGHT, Fragment, LossScale
from pretrain.config import BUCKET_ELEMENTS, OptimConfig, Precision, TrainConfig, accumulation_steps, sums_in_fp32
from pretrain.data.loader import MicroBatch
from pretrain.dist import Process
from pretrain.optim.lamb import Lamb
from pretrain.optim.muon import Muon
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.sharded import Piece, ShardedOptimizer

_EXTRA_KEYS = frozenset(  # top-level keys that DeepSpeed 0.19 reads and that leave optimizer, schedule and data to us
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "sparse_gradients",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)


class StepResult(NamedTuple):
    """What an optimizer step did."""

    applied: bool  # False: a gradient was not finite on some rank, and no rank changed its weights
    grad_norm: float | Tensor  # global, before clipping; a tensor is still on the device


class Shard(NamedTuple):
    """Where this rank's part of a parameter lies in the fp32 tensors that the optimizer updates."""

    tensor: Tensor  # the optimizer's: the parameter itself at stage 0, else flat, with others beside it
    offset: int  # first element there
    start: int  # first element in the flattened parameter
    length: int


class Engine:
    """A module under DeepSpeed ZeRO."""

    def __init__(self, module: nn.Module, config: TrainConfig, process: Process) -> None:
        """`module` holds the fp32 weights to start from; its parameters are converted and sharded here.

        Raises `UserError` for a combination that the device or DeepSpeed cannot do.
        """
        check_precision(config, process.device)
        self.process, self.stage, self.precision = process, config.stage, config.precision
        deepspeed = _import_deepspeed(process.device)
        # Under Hugging Face's names, each parameter once (the decoder is tied), in one order on every rank.
        self._names = [name.removeprefix("hf.") for name, _ in module.named_parameters()]
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        optimizer = build_optimizer(module.named_parameters(), config.optim)
        self._inner = optimizer
        settings = deepspeed_config(
            config, process.world_size, self.num_parameters, on_gpu=process.device.type == "cuda"
        )
        if config.deepspeed.extra:
            check_settings(settings)
        self._deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._scaler: Any = None  # of losses in fp16
        if self.precision is Precision.fp16:
            own = _loss_scaler(self._deepspeed._config.float16_config) if self.stage == 0 else None
            self._scaler = own or self._deepspeed.optimizer.loss_scaler
            self._scaler.raise_error_at_min_scale = False  # which would be a traceback; the loop counts skipped steps
        if self.stage == 0:
            self._guard = _StageZeroGuard(optimizer, config.optim, self._scaler)
        if self.stage and isinstance(optimizer, ShardedOptimizer):
            self._tell_pieces(optimizer)

    def backward(
        self, batch: MicroBatch, loss_of: Callable[[tuple[Tensor, Tensor], MicroBatch], Tensor], *, last: bool = True
    ) -> None:
        """Forward and backward of one micro-batch, the `last` of its step or not.

        `loss_of(logits, batch)` is this rank's share of the global loss.
        """
        self._deepspeed.set_gradient_accumulation_boundary(last)
        with self._autocast():
            logits = self._deepspeed(batch)
        # DeepSpeed averages gradients over ranks; our loss is already a share of the whole, so undo that.
        loss = loss_of(logits, batch) * self.process.world_size
        if self.stage == 0 and self._scaler:
            loss = loss * self._scaler.loss_scale
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self._deepspeed.step()  # counts the micro-batch; no update

    def step(self, lr: float) -> StepResult:
        """The update after the last micro-batch of a step. Waits for the device: whether gradients are finite."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        if self.stage == 0:
            return StepResult(self._guard.applied, self._guard.grad_norm)
        norm, applied = self._deepspeed.get_global_grad_norm(), bool(self._deepspeed.was_step_applied())
        if not applied and self.stage == 2:  # offloaded, it would add the next gradients to those of the skipped step
            sums = self._deepspeed.optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))
        return StepResult(applied, float("nan") if norm is None else norm)

    def set_distance_bias(self, slope: float) -> None:
        """Of the training forward passes to come, per token of distance."""
        self._deepspeed.module.distance_bias = slope

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logits without dropout. Collective under ZeRO 3: every rank calls it equally often."""
        self._deepspeed.eval()
        with self._autocast():
            logits: tuple[Tensor, Tensor] = self._deepspeed(batch)
        self._deepspeed.train()
        return logits

    @property
    def loss_scale(self) -> LossScale:
        """Of fp16; 1 otherwise."""
        scaler = self._scaler
        if not scaler or not scaler.dynamic:
            return LossScale(value=float(scaler.loss_scale) if scaler else 1.0)
        steady = scaler.cur_iter - scaler.last_overflow_iter - 1
        return LossScale(value=float(scaler.cur_scale), steady_steps=steady, hysteresis=scaler.cur_hysteresis)

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far, as the optimizer counts them for its bias correction."""
        steps = [int(state["step"]) for state in self._inner.state.values() if "step" in state]
        return max(steps, default=0)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, by name."""
        return {name: self._shape(parameter) for name, parameter in self._parameters()}

    def fragments(self) -> list[Fragment]:
        """This rank's share of fp32 weights and moments, copied to the CPU. Not collective: nothing is sent.

        At stage 0 every rank holds everything, so rank 0 alone gives it.
        """
        result: list[Fragment] = []
        if self.stage == 0 and not self.process.is_main:
            return result
        for name, parameter in self._parameters():
            shard = self._shard(parameter)
            for kind in KINDS if shard.length else ():
                if kind == WEIGHT or kind in self._inner.state.get(shard.tensor, ()):
                    values = self._values(shard, kind).to("cpu", torch.float32, copy=True)
                else:  # no step was applied yet
                    values = torch.zeros(shard.length)
                result.append(Fragment(name, kind, shard.start, values))
        return result

    def load_full_state(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        *,
        optimizer_steps: int,
        loss_scale: LossScale,
        sample: MicroBatch,
    ) -> None:
        """Restore full weights and moments, by name, on any stage and world size. Collective.

        Optimizer state exists only after a step, and low-precision weights follow the fp32 ones only in a step: so one
        is taken in between, on `sample`, with zero gradients and a learning rate of zero.
        """
        for name, parameter in self._parameters():
            self._set(parameter, WEIGHT, weights[name])
        self.backward(sample, lambda logits, _: (logits[0].float().sum() + logits[1].float().sum()) * 0.0, last=True)
        if not self.step(0.0).applied:
            raise UserError(
                "the checkpoint's weights give outputs that are not finite; remove it to resume from another"
            )
        for name, parameter in self._parameters():
            for kind in MOMENTS:
                self._set(parameter, kind, moments[f"{name}.{kind}"])
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_steps)
        if self._scaler and self._scaler.dynamic:
            self._scaler.cur_scale, self._scaler.cur_hysteresis = loss_scale.value, loss_scale.hysteresis
            self._scaler.cur_iter, self._scaler.last_overflow_iter = loss_scale.steady_steps, -1

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return zip(self._names, self._deepspeed.module.parameters(), strict=True)

    def _autocast(self) -> torch.autocast:
        """Stage 0 keeps fp32 weights and lets torch choose: DeepSpeed's own optimizers there are another path."""
        low = torch.float16 if self.precision is Precision.fp16 else torch.bfloat16
        enabled = self.stage == 0 and self.precision is not Precision.fp32
        return torch.autocast(self.process.device.type, low, enabled=enabled)

    def _shape(self, parameter: Any) -> torch.Size:
        shape: torch.Size = parameter.ds_shape if self.stage == 3 else parameter.shape
        return shape

    def _shard(self, parameter: Any) -> Shard:
        if self.stage == 0:
            return Shard(parameter, 0, 0, parameter.numel())
        if self.stage == 3:
            zero = self._deepspeed.optimizer
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(self.process.rank * size, parameter.ds_numel)  # the last share is padded, or all padding
            length = min(size, parameter.ds_numel - start)
            return Shard(zero.fp32_partitioned_groups_flat[group], offset, start, length)
        mapping = parameter._hp_mapping
        if mapping is None:  # no element of it is on this rank
            return Shard(torch.empty(0), 0, 0, 0)
        (flat,) = self._inner.param_groups[mapping.param_group_index]["params"]
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Shard(flat, inside.start, whole.start, whole.numel)

    def _values(self, shard: Shard, kind: str) -> Tensor:
        """The elements of a shard that is not empty, as a view of the optimizer's own."""
        whole: Tensor = shard.tensor if kind == WEIGHT else self._inner.state[shard.tensor][kind]
        return whole.detach().view(-1)[shard.offset : shard.offset + shard.length]

    def _set(self, parameter: Any, kind: str, value: Tensor) -> None:
        """Put this rank's share of the full `value` in place. Not collective."""
        shard = self._shard(parameter)
        if shard.length:
            self._values(shard, kind).copy_(value.flatten()[shard.start : shard.start + shard.length])

    def _tell_pieces(self, optimizer: ShardedOptimizer) -> None:
        pieces: dict[Tensor, list[Piece]] = {}
        for number, (_, parameter) in enumerate(self._parameters()):
            tensor, *place = self._shard(parameter)
            if place[-1]:
                pieces.setdefault(tensor, []).append(Piece(number, *place))

        def add_over_ranks(sums: Tensor) -> None:
            on_device = sums.to(self.process.device)  # offloaded tensors are on the CPU, which NCCL cannot reach
            torch.distributed.all_reduce(on_device)
            sums.copy_(on_device)

        optimizer.shard(pieces, list(self.shapes.values()), add_over_ranks)


class _StageZeroGuard:
    """Clipping, the loss scale and the check for finite gradients at stage 0, where DeepSpeed would apply NaN.

    Runs right before the optimizer's own step, when gradients are already reduced: the same on every rank. A parameter
    without a gradient is left alone by torch's optimizers, so dropping the gradients skips the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, scaler: Any) -> None:
        self.applied, self.grad_norm, self._clip, self._scaler = True, 0.0, config.clip, scaler
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: Any) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scaler:
            torch._foreach_mul_(gradients, 1 / self._scaler.loss_scale)
        # In fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU.
        squares = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradients]).square()
        self.grad_norm = float(squares.sum().sqrt())
        self.applied = math.isfinite(self.grad_norm)
        if not self.applied:
            for parameter in self._parameters:
                parameter.grad = None
        elif self._clip and self.grad_norm > self._clip:
            torch._foreach_mul_(gradients, self._clip / self.grad_norm)
        if self._scaler:
            self._scaler.update_scale(not self.applied)


def _loss_scaler(options: Any) -> Any:
    """DeepSpeed's own, which it makes for the other stages, from `deepspeed.extra.fp16`."""
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    return CreateLossScaler(torch.half, options.loss_scale, options.loss_scale == 0, options.dynamic_loss_scale_args())


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse what this device cannot compute in."""
    if config.precision is Precision.fp16 and device.type == "cpu":
        raise UserError("precision=fp16: not possible on a CPU; use precision=bf16 or fp32")
    if config.precision is not Precision.bf16 or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("precision=bf16: this GPU has no bfloat16; use precision=fp16 or fp32")


def deepspeed_config(
    config: TrainConfig, world_size: int, num_parameters: int, *, on_gpu: bool = False
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a run, `deepspeed.extra` merged in.

    Raises `UserError` where `deepspeed.extra` would change a key of ours, or names a key that DeepSpeed does not know
    (it ignores unknown top-level keys silently).
    """
    bucket = min(BUCKET_ELEMENTS, num_parameters + num_parameters % 2)  # DeepSpeed wants it even
    ours: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(
            config.global_batch_size, config.micro_batch_size, world_size
        ),
        "gradient_clipping": config.optim.clip if config.stage else 0.0,  # it defaults to 1.0
        "steps_per_print": None,
        "zero_optimization": {"stage": config.stage},
    }
    if config.stage:
        ours["zero_optimization"] |= {
            "contiguous_gradients": True,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        ours["bf16"] = {"enabled": config.precision is Precision.bf16}
        ours["fp16"] = {"enabled": config.precision is Precision.fp16}
    if sums_in_fp32(config, world_size):
        ours["data_types"] = {"grad_accum_dtype": "fp32"}  # it defaults to the precision of the run
    if config.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        ours["zero_force_ds_cpu_optimizer"] = False  # ours run on a CPU as they are, and need no compiler
    if config.stage == 3:
        ours["zero_optimization"] |= {"stage3_prefetch_bucket_size": bucket // 10, "stage3_max_live_parameters": bucket}
    extra = config.deepspeed.extra or {}
    for key in set(extra) - _EXTRA_KEYS - set(ours):
        close = difflib.get_close_matches(key, _EXTRA_KEYS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(_EXTRA_KEYS))}"
        raise UserError(f"deepspeed.extra.{key}: not a key of DeepSpeed's that may be added here; {hint}")
    return _merged(ours, extra, "deepspeed.extra")


def check_settings(settings: Mapping[str, Any]) -> None:
    """What DeepSpeed finds wrong within sections, said in one line."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        # Without the global batch: it knows of one rank as yet, and would find that the numbers do not fit.
        DeepSpeedConfig({key: value for key, value in settings.items() if key != "train_batch_size"})
    except (ValueError, TypeError, DeepSpeedConfigError) as error:
        reason = ": ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"deepspeed.extra: DeepSpeed refuses it ({reason}); correct it") from error


def _merged(ours: Mapping[str, Any], extra: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Deep merge that only adds."""
    result = dict(ours)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value, f"{where}.{key}")
        elif key in result:
            raise UserError(f"{where}.{key}: Cloze sets this key itself ({result[key]!r}); use its own options")
        else:
            result[key] = value
    return result


def _import_deepspeed(device: torch.device) -> Any:
    """Import it quietly, for the device there is, without a compiler."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import engine as its_engine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # its calls, not the user's
    # Its shared-memory collectives for CPUs would be compiled at start-up, and crash where there is no compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # Stage 1 in bf16 with sums in fp32 would get an optimizer of another layout, which all-reduces every gradient in
    # fp32; that of fp16 does it too.
    its_engine.BFLOAT16 = its_engine.ZERO_OPTIMIZATION
    if Lamb not in ZERO_SUPPORTED_OPTIMIZERS:  # it warns of optimizers that it does not know
        ZERO_SUPPORTED_OPTIMIZERS.extend([Lamb, Muon])
    return deepspeed
