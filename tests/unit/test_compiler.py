"""torch.compile's compiler is asked for before a run begins (case 61), and a build says how long it takes."""

import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.callback import callback_handler

from cloze.errors import UserError
from pretrain.model import compiler

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def nothing_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def callbacks() -> Iterator[None]:
    """torch keeps no clock of ours."""
    yield
    callback_handler.start_callbacks.clear()
    callback_handler.end_callbacks.clear()
    compiler._tell_of_builds.cache_clear()


def refused(device: torch.device) -> str:
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        compiler.require_compiler(device, said.append)
    assert not said
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("nothing_on_the_path")
def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(CPU).startswith("compile=true: needs a C++ compiler, and there is no ")
    monkeypatch.setenv("CXX", "g++-99")
    assert "there is no g++-99; install one" in refused(CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else 1)
    assert "needs Triton, which is not installed" in refused(GPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: 1)
    assert "there is no gcc or clang; install one" in refused(GPU)


def test_a_compiler_that_cannot_build_is_one_line(
    nothing_on_the_path: Path, monkeypatch: pytest.MonkeyPatch, callbacks: None
) -> None:
    """As g++ without Python's headers does, in two hundred lines of torch's."""
    for name in ("g++", "clang++"):
        (nothing_on_the_path / name).write_text("#!/bin/sh\n")
        (nothing_on_the_path / name).chmod(0o755)

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*_: Any) -> None:
            raise RuntimeError("backend raised:\nOutput:\n x.cpp:1:10: fatal error: Python.h: No such file\n and more")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(
        UserError, match=r"a trial failed \(x.cpp:1:10: fatal error: Python.h: No such file\)"
    ) as caught:
        compiler.require_compiler(CPU, lambda _: None)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or set compile=false")


def test_a_build_has_a_clock(monkeypatch: pytest.MonkeyPatch, callbacks: None) -> None:
    """Told while it goes on and at its end; what was built before says nothing."""
    monkeypatch.setattr(compiler, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(compiler, "_WORTH_SAYING_SECONDS", 0.1)
    said: list[str] = []
    say = said.append
    for _ in range(2):  # --multirun has several runs in a process
        compiler._tell_of_builds(say)

    def slow(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        time.sleep(0.3)
        return graph.forward

    built = torch.compile(lambda x: x + 1, backend=slow)
    assert built(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(said) > 2
    assert all(re.fullmatch(r"compiling: \d+ s", line) for line in said[:-1])
    assert re.fullmatch(r"compiled in \d+ s", said[-1])
    told = len(said)
    built(torch.ones(2))
    time.sleep(0.12)
    assert len(said) == told, "no build, no word"
