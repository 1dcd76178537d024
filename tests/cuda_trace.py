"""Training steps on a GPU that is not there: fake tensors of device "cuda" through the engine's own code at stage 0.

`python -m tests.cuda_trace CASES.json` prints what each case did, as JSON; tests/unit/test_cuda_trace.py says what is
right. It is a process of its own, since it makes torch believe in a GPU.

What runs is what runs on a GPU: `Engine` (autocast, loss scale, clipping, the check for what is finite), `PackedBert`,
`pretraining_loss`, our optimizers, torch's autograd with its thread for the device, and CUDA's own rules of autocast.
Left out is DeepSpeed, which at stage 0 on one rank only calls the module and the optimizer (`_StageZero`). Operators
compute shapes, types and devices, no numbers: one that would need a number (`item`, `nonzero`) is noted or raises.

What no trace shows: what kernels compute and how fast, their workspaces (flash attention's sums of dq in fp32), what
the allocator wastes, NCCL, and ZeRO 1 to 3. A wait of the host is seen where data are read or copied, not where a
library waits by itself.
"""

import ctypes
import json
import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cloze import cli
from cloze.corpus.manifest import TokenizerFacts
from pretrain.config import TrainConfig
from pretrain.data.loader import MicroBatch
from pretrain.dist import Process
from pretrain.engine import engine as engine_module
from pretrain.model.attention import choose_kernel
from pretrain.model.bert import PackedBert, PreTrainedModel
from pretrain.model.loss import pretraining_loss

TORCH = Path(torch.__file__).parent
CUDA = torch.device("cuda", 0)
HOPPER = (9, 0)
FACTS = TokenizerFacts(fingerprint="", vocab_size=30_522, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
BLOCK = 512  # bytes: torch's allocator rounds up to multiples of it
aten = torch.ops.aten


# A torch that was built without CUDA has its operators' shapes and its rules of autocast, but autograd asks for a
# device guard, and for the kind of accelerator there is. Both are tables of C++ functions, which are filled in here.


class _Guard(torch._C._acc.DeviceGuard):
    """There is one device, and nothing to do to change to it."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.CUDA


_YES = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
_ALIVE: list[Any] = [_Guard()]


def _virtual_functions(name: str) -> list[str]:
    """Of a struct of ATen, in the order of its table: as declared, a destructor twice."""
    header = (TORCH / "include" / "ATen" / "detail" / f"{name}.h").read_text()
    found = re.search(rf"struct (?:TORCH_API )?{name}\b[^;]*?\{{(.*?)\n\}};", header, re.DOTALL)
    assert found
    names = re.findall(r"^  virtual [^;{=]*?(~?\w+)\(", found[1], re.MULTILINE)
    return [each for name in names for each in ([name, name] if name.startswith("~") else [name])]


def believe_in_a_gpu() -> None:
    """From now on autograd takes tensors of device "cuda", and autocast does not turn itself off."""
    cuda, private = (int(getattr(torch._C._autograd.DeviceType, name)) for name in ("CUDA", "PrivateUse1"))
    torch._C._acc.register_python_privateuseone_device_guard(_ALIVE[0])
    c10, cpu = (ctypes.CDLL(str(TORCH / "lib" / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * (private + 1)).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[cuda] = guards[private]

    hooks_of = cpu._ZN2at6detail12getCUDAHooksEv
    hooks_of.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = hooks_of()
    names = [each for base in ("AcceleratorHooksInterface", "CUDAHooksInterface") for each in _virtual_functions(base)]
    word = ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * (2 + len(names)))()  # two words stand before the first function
    ctypes.memmove(table, hooks[0] - 2 * word, ctypes.sizeof(table))
    for name in ("isBuilt", "hasCUDA", "hasPrimaryContext"):
        table[2 + names.index(name)] = ctypes.cast(_YES, ctypes.c_void_p).value
    _ALIVE.append(table)
    hooks[0] = ctypes.addressof(table) + 2 * word
    assert torch.accelerator.current_accelerator() == torch.device("cuda"), "its tables lie otherwise in this torch"

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    F.scaled_dot_product_attention = _memory_efficient_attention


def _memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float, scale: float
) -> Tensor:
    """What CUDA chooses where there is a mask, since flash attention takes none. Without CUDA torch chooses another."""
    assert attn_mask.shape[-1] % 16 == 0, "it would be copied to a multiple of 16"
    if attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, False, scale=scale
    )[0]
    return out


class Trace(TorchDispatchMode):
    """Counts live bytes on the device, and notes where the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.waits: list[str] = []
        self.operators: Counter[str] = Counter()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # autograd asks for it thousands of times
            return args[0].fake_device
        self.operators[func._schema.name.removeprefix("aten::")] += 1
        if func is aten._local_scalar_dense.default:  # `item`, `float`, `int`, `if`
            if args[0].fake_device.type == "cuda":
                self.waits.append(f"reads a number: {_caller()}")
            return 1
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            self._note_copy(args[0], out, (kwargs or {}).get("non_blocking", False))
        elif func is aten.copy_.default:
            self._note_copy(args[1], out, len(args) > 2 and args[2])
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self._count(tensor)
        return out

    def _note_copy(self, source: FakeTensor, out: FakeTensor, non_blocking: bool) -> None:
        if source.fake_device != out.fake_device and not non_blocking:
            self.waits.append(f"copies between devices: {_caller()}")

    def _count(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def freed(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live


def _caller() -> str:
    """The innermost line of our own code, or of torch's optimizers, that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if {"pretrain", "optim"} & set(path.parts):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class _StageZero:
    """What DeepSpeed does at stage 0 on one rank."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], **_: Any) -> None:
        self.module, self.optimizer, self._settings = model, optimizer, config
        self.enable_backward_allreduce, self.dp_world_size = True, 1
        self._last = True

    @property
    def _config(self) -> Any:
        from deepspeed.runtime.config import DeepSpeedConfig  # for fp16 alone: it takes seconds

        return DeepSpeedConfig(self._settings)

    def __call__(self, batch: MicroBatch) -> Any:
        return self.module(batch)

    def gradient_clipping(self) -> float:
        return float(self._settings["gradient_clipping"])

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self._last = last

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        if self._last:
            self.optimizer.step()
            self.optimizer.zero_grad()


def traced(case: dict[str, Any]) -> dict[str, Any]:
    """An optimizer step after the first, of `accumulation` micro-batches."""
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d", "zero=0", *case["overrides"]])
    samples, max_len, masked = config.micro_batch_size, case["max_len"], case["masked"]
    tokens, trace = case.get("tokens", samples * max_len), Trace()
    PreTrainedModel.initialize_weights = lambda self: None  # drawn until they suit: by numbers
    engine_module._import_deepspeed = lambda _: SimpleNamespace(initialize=lambda **given: (_StageZero(**given),))
    with FakeTensorMode(), trace:
        kernel = choose_kernel(config.model, config.precision, HOPPER)
        with CUDA:
            module = PackedBert(config.model, FACTS, max_len=max_len, kernel=kernel)
        engine = engine_module.Engine(module, config, Process(0, 1, 0, CUDA, None))  # type: ignore[arg-type]
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        engine.step(0.0)  # the optimizer's state is there from now on
        engine.set_distance_bias(case.get("slope", 0.0))
        sums, seen = torch.zeros(4, dtype=torch.float64, device=CUDA), []

        def loss_of(logits: tuple[Tensor, Tensor], batch: MicroBatch) -> Tensor:
            losses = pretraining_loss(
                logits, batch.mlm_labels_M, batch.nsp_labels_N, weights=config.loss, masked=masked, pairs=samples
            )
            sums.add_(losses.sums)
            seen.extend([*logits, losses.loss])
            match case.get("fault"):
                case "item":
                    losses.loss.item()
                case "copy":
                    losses.loss.cpu()
                case "nonzero":
                    batch.mlm_labels_M.nonzero()
            return losses.loss

        trace.operators.clear()
        trace.waits.clear()
        trace.peak = trace.live
        count = config.global_batch_size // samples
        for number in range(count):
            sizes = (tokens, tokens, tokens, samples + 1, masked, masked, samples)
            parts = [torch.empty(size, dtype=torch.int64) for size in sizes]
            parts[3] = parts[3].int()
            batch = MicroBatch(*parts, max_len, 0, tokens, masked)
            engine.backward(batch.to(CUDA), loss_of, last=number == count - 1)
            told = [f"{tensor.dtype} {list(tensor.shape)} {tensor.fake_device}" for tensor in seen]
            seen.clear()
        gradients = {f"{parameter.grad.dtype} {parameter.grad.fake_device}" for parameter in module.parameters()}
        in_backward = list(trace.waits)
        result = engine.step(1e-4)
        moments = [state["exp_avg"] for state in engine._inner.state.values()]
    return {
        "kernel": kernel.value,
        "parameters": engine.num_parameters,
        "seen": told,
        "gradients": sorted(gradients),
        "moments": sorted({f"{moment.dtype} {moment.fake_device}" for moment in moments}),
        "waits": {"backward": in_backward, "step": trace.waits[len(in_backward) :]},
        "applied": result.applied,
        "peak": trace.peak,
        "operators": trace.operators,
    }


def main() -> None:
    believe_in_a_gpu()
    found = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            found.append(traced(case))
        except DynamicOutputShapeException as error:
            found.append({"raised": str(error)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
