"""`precision=auto`: what the device computes fastest without losing what training needs."""

import platform
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.config import Precision, TrainConfig

CPU_INFO = Path("/proc/cpuinfo")
_NAMING = ("model name", "cpu family", "model")
_TELLING = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")  # decide how fast products are


def with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with `precision=auto` replaced by what suits this device; any other precision stays."""
    if config.precision is not Precision.auto:
        return config
    return replace(config, precision=fastest_precision(device))


def fastest_precision(device: torch.device) -> Precision:
    """bf16 on GPUs that compute in it and on CPUs with AMX, where its products are 3 to 12 times as fast; else fp32.

    AVX-512's bf16 instructions alone are no reason: on a CPU that shows them and no AMX, bf16 products ran at half to
    four fifths of fp32's speed (docs/LOG.md), and CPUs without either emulate it.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision.bf16 if supported else Precision.fp16
    return Precision.bf16 if "amx_bf16" in cpu_flags() else Precision.fp32


def cpu_flags() -> frozenset[str]:
    """What this CPU can do, by the kernel's names; nothing where the kernel does not tell."""
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def cpu_name() -> str:
    """Model name, family, model and the flags that matter, by the kernel's word; or what the platform calls itself."""
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    named = [f"{key} {fields[key]}".removeprefix("model name ") for key in _NAMING if key in fields]
    return ", ".join([*named, *(flag for flag in _TELLING if flag in cpu_flags())])
