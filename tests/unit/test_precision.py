"""precision=auto on devices of every kind."""

from pathlib import Path

import pytest
import torch

from cloze import cli
from pretrain import precision
from pretrain.config import Precision, TrainConfig
from pretrain.precision import cpu_flags, cpu_name, fastest_precision, with_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16 amx_tile", Precision.bf16),
        ("fpu avx512f avx512_bf16", Precision.fp32),  # its products are slower than fp32's
        ("fpu avx2", Precision.fp32),
        ("", Precision.fp32),
    ],
)
def test_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: Precision) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: X\nflags\t\t: {flags}\nbugs\t: amx_bf16\n")
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_flags() == frozenset(flags.split())
    assert fastest_precision(CPU) is expected
    told = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags.split()]
    assert cpu_name() == ", ".join(["X", *told])
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "none")
    assert fastest_precision(CPU) is Precision.fp32
    assert cpu_name()


@pytest.mark.parametrize(("supported", "expected"), [(True, Precision.bf16), (False, Precision.fp16)])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, supported: bool, expected: Precision) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert fastest_precision(CUDA) is expected


def test_what_is_asked_for_stays() -> None:
    config = cli.compose("train", TrainConfig, ["run=r", "data.path=d"])
    assert config.precision is Precision.auto
    assert with_precision(config, CPU).precision in (Precision.fp32, Precision.bf16)
    asked = cli.compose("train", TrainConfig, ["run=r", "data.path=d", "precision=bf16"])
    assert with_precision(asked, CPU) is asked
