"""A module under DeepSpeed ZeRO, and every key of DeepSpeed's configuration; quirks.py has what is reached into there.

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
from pretrain.config import BUCKET_ELEMENTS, ModelConfig, Precision, TrainConfig, accumulation_steps, sums_in_fp32
from pretrain.data.loader import MicroBatch
from pretrain.dist import Process
from pretrain.engine import quirks
from pretrain.engine.layers import LayerWatch
from pretrain.optim.optimizer import build_optimizer
from pretrain.optim.options import OptimConfig
from pretrain.optim.sharded import Partition, ShardedOptimizer

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


class Engine:
    """A module under DeepSpeed ZeRO."""

    def __init__(self, module: nn.Module, config: TrainConfig, process: Process) -> None:
        """`module` holds the fp32 weights to start from; its parameters are converted and sharded here.

        Raises `UserError` for a combination that the device or DeepSpeed cannot do.
        """
        check_precision(config, process.device)
        self.process, self.stage, self.precision = process, config.zero.stage, config.precision
        deepspeed = _import_deepspeed(process.device)
        # Under Hugging Face's names, each parameter once (the decoder is tied), in one order on every rank.
        self._names = [name.removeprefix("hf.") for name, _ in module.named_parameters()]
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        optimizer = build_optimizer(module.named_parameters(), config.optim)
        self._inner = optimizer
        if isinstance(optimizer, ShardedOptimizer):
            quirks.announce_optimizers([type(optimizer)])
        settings = deepspeed_config(
            config, process.world_size, self.num_parameters, on_gpu=process.device.type == "cuda"
        )
        if config.deepspeed.extra:
            check_settings(settings)
        self._deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._scaler: Any = None  # of losses in fp16
        self.layers: LayerWatch | None = None  # where log.layers_every asks for it
        if self.precision is Precision.fp16:
            its = self._deepspeed
            scaler = its.optimizer.loss_scaler if self.stage else quirks.create_loss_scaler(its)
            self._scaler = quirks.soften_loss_scaler(scaler)
        if self.stage == 0:
            quirks.check_plain_optimizer(self._deepspeed, optimizer)
            if process.world_size == 1:
                quirks.skip_reduction(self._deepspeed)
            if config.log.layers_every:  # before the guard, which clips
                self.layers = LayerWatch(optimizer, zip(self._names, module.parameters(), strict=True))
            self._guard = _StageZeroGuard(optimizer, config.optim, self._scaler)
        self._partitions = self._find_partitions()
        if self.stage and isinstance(optimizer, ShardedOptimizer):
            self._register_partitions(optimizer)

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
        if not applied and self.stage == 2:
            quirks.drop_gradients_of_skipped_step(self._deepspeed.optimizer)
        return StepResult(applied, float("nan") if norm is None else norm)

    def set_distance_bias(self, slope: float) -> None:
        """Of the training forward passes to come, per token of distance."""
        self._deepspeed.module.distance_bias = slope

    def set_dropout(self, hidden: float, attention: float) -> None:
        """Of the training forward passes to come, probabilities."""
        self._deepspeed.module.set_dropout(hidden, attention)

    def set_weight_decay(self, value: float) -> None:
        """Of the steps to come, of the parameters that have some."""
        for group in self._deepspeed.optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = value

    def set_rotary(self, model: ModelConfig) -> None:
        """Of the forward passes to come: how positions turn, where they do."""
        self._deepspeed.module.set_rotary(model)

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
        return quirks.read_loss_scale(self._scaler) if self._scaler else LossScale()

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far, as the optimizer counts them for its bias correction."""
        steps = [int(state["step"]) for state in self._inner.state.values() if "step" in state]
        return max(steps, default=0)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every parameter, by name."""
        return {name: quirks.whole_shape(parameter, self.stage) for name, parameter in self._parameters()}

    def fragments(self) -> list[Fragment]:
        """This rank's share of fp32 weights and moments, copied to the CPU. Not collective: nothing is sent.

        At stage 0 every rank holds everything, so rank 0 alone gives it.
        """
        result: list[Fragment] = []
        if self.stage == 0 and not self.process.is_main:
            return result
        for number, partition in self._partitions.items():
            for kind in KINDS:
                if kind == WEIGHT or kind in self._inner.state.get(partition.tensor, ()):
                    values = self._values(partition, kind).to("cpu", torch.float32, copy=True)
                else:  # no step was applied yet
                    values = torch.zeros(partition.length)
                result.append(Fragment(self._names[number], kind, partition.start, values))
        return result

    def replicated(self) -> dict[str, Tensor]:
        """What every rank holds alike, to the bit, by name, where it lies. Not collective.

        At stage 0 fp32 weights and moments; at 1 and 2 the weights that the model computes with, which are sent around
        anew in each step; at 3 those of them that DeepSpeed leaves whole since they are small. All else is on one rank.
        """
        whole = [(name, p) for name, p in self._parameters() if self.stage < 3 or quirks.stays_whole(p)]
        found = {name: parameter.detach() for name, parameter in whole}
        if self.stage == 0:
            state = self._inner.state
            found |= {
                f"{name}.{kind}": state[p][kind] for name, p in whole for kind in MOMENTS if kind in state.get(p, ())
            }
        return found

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
        for number, name in enumerate(self._names):
            self._set(number, WEIGHT, weights[name])
        self.backward(sample, lambda logits, _: (logits[0].float().sum() + logits[1].float().sum()) * 0.0, last=True)
        if not self.step(0.0).applied:
            raise UserError(
                "the checkpoint's weights give outputs that are not finite; remove it to resume from another"
            )
        for number, name in enumerate(self._names):
            for kind in MOMENTS:
                self._set(number, kind, moments[f"{name}.{kind}"])
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_steps)
        if self._scaler:
            quirks.write_loss_scale(self._scaler, loss_scale)

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return zip(self._names, self._deepspeed.module.parameters(), strict=True)

    def _autocast(self) -> torch.autocast:
        """Stage 0 keeps fp32 weights and lets torch choose: DeepSpeed's own optimizers there are another path."""
        low = torch.float16 if self.precision is Precision.fp16 else torch.bfloat16
        enabled = self.stage == 0 and self.precision is not Precision.fp32
        return torch.autocast(self.process.device.type, low, enabled=enabled)

    def _find_partitions(self) -> dict[int, Partition]:
        """This rank's part of each parameter, by the parameter's number; of which it has no element, none."""
        found = {}
        for number, (_, parameter) in enumerate(self._parameters()):
            if self.stage == 0:
                partition: Partition | None = Partition(parameter, 0, 0, parameter.numel())
            elif self.stage == 3:
                partition = quirks.partition_of_parameter(parameter, self._deepspeed.optimizer, self.process.rank)
            else:
                partition = quirks.partition_of_flat_group(parameter, self._inner)
            if partition:
                if self.stage:
                    quirks.check_partition(parameter, partition, self.stage)
                found[number] = partition
        return found

    def _values(self, partition: Partition, kind: str) -> Tensor:
        """The elements of a partition, as a view of the optimizer's own."""
        whole: Tensor = partition.tensor if kind == WEIGHT else self._inner.state[partition.tensor][kind]
        return partition.of(whole.detach())

    def _set(self, number: int, kind: str, value: Tensor) -> None:
        """Put this rank's partition of the full `value` in place. Not collective."""
        if partition := self._partitions.get(number):
            mine = value.flatten()[partition.start : partition.start + partition.length]
            self._values(partition, kind).copy_(mine)

    def _register_partitions(self, optimizer: ShardedOptimizer) -> None:
        def add_over_ranks(sums: Tensor) -> None:
            on_device = sums.to(self.process.device)  # offloaded tensors are on the CPU, which NCCL cannot reach
            torch.distributed.all_reduce(on_device)
            sums.copy_(on_device)

        optimizer.register_partitions(self._partitions, list(self.shapes.values()), add_over_ranks)


class _StageZeroGuard:
    """Clipping, the loss scale and the check for finite gradients at stage 0, where DeepSpeed would apply NaN.

    Runs right before the optimizer's own step, when gradients are already reduced: the same on every rank. A parameter
    without a gradient is left alone by torch's optimizers, so dropping the gradients skips the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, scaler: Any) -> None:
        self.applied, self.grad_norm, self._clip, self._scaler = True, 0.0, config.clip, scaler
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # torch's fused AdamW divides gradients as it reads them: on a CPU another pass over memory would show.
        self._divides = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and self._parameters[0].is_cpu
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scaler:
            torch._foreach_mul_(gradients, 1 / self._scaler.loss_scale)
        # Row by row, then in fp64: summed in fp32 the norm of an embedding matrix is off by some 1e-4 on a CPU, and
        # in fp64 throughout it takes 30 times as long.
        rows = torch.cat([torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients])
        self.grad_norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
        self.applied = math.isfinite(self.grad_norm)
        if not self.applied:
            for parameter in self._parameters:
                parameter.grad = None
        elif self._clip:
            excess = self.grad_norm / self._clip
            if self._divides:
                optimizer.grad_scale = torch.tensor(excess) if excess > 1.0 else None
            elif excess > 1.0:
                torch._foreach_mul_(gradients, 1 / excess)
        if self._scaler:
            self._scaler.update_scale(not self.applied)


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse what this device cannot compute in."""
    assert config.precision is not Precision.auto, "see pretrain.precision"
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
        "train_batch_size": config.peak_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config.peak_batch_size, config.micro_batch_size, world_size),
        "gradient_clipping": config.optim.clip if config.zero.stage else 0.0,  # it defaults to 1.0
        "steps_per_print": None,
        "zero_optimization": {"stage": config.zero.stage},
    }
    if config.zero.stage:
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
    if config.zero.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        ours["zero_force_ds_cpu_optimizer"] = False  # ours run on a CPU as they are, and need no compiler
    if config.zero.stage == 3:
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

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # its calls, not the user's
    quirks.disable_shared_memory_collectives()
    quirks.keep_one_optimizer_layout()
    return deepspeed
