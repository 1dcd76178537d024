"""The compiler behind torch.compile: whether it is there, asked before a run begins, and a clock while it builds.

On a CPU that is a C++ compiler, on a GPU Triton with a C compiler. Knows nothing of what is compiled.
"""

import importlib.util
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from cloze.errors import UserError, first_line

_TICK_SECONDS = 10.0
_WORTH_SAYING_SECONDS = 1.0


def require_compiler(device: torch.device, say: Callable[[str], None]) -> None:
    """Build one small function for `device` and call it; from now on every build is told by `say`, with a clock.

    Raises `UserError` where there is no compiler, or it cannot build.
    """
    if lacking := _lacking(device.type):
        raise UserError(f"compile=true: {lacking}, or set compile=false")
    say("compile=true: a trial now, then the layers in the first steps and in the first evaluation")
    _tell_of_builds(say)
    try:
        torch.compile(_trial)(torch.ones(64, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(
            f"compile=true: the compiler is there, and a trial failed ({_reason(error)}); it may lack Python's headers "
            "(Debian, Ubuntu: apt-get install python3-dev), or set compile=false"
        ) from error


def _lacking(device_type: str) -> str:
    """What is not there and how to get it, or nothing."""
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "needs Triton, which is not installed; pip install triton"
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        kind, variable = "C", "CC"
    else:
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
        kind, variable = "C++", "CXX"
    if any(shutil.which(name) for name in names):
        return ""
    return (
        f"needs a {kind} compiler, and there is no {' or '.join(names)}; install one (Debian, Ubuntu: apt-get install "
        f"g++), or name it by {variable}=/path/to/it"
    )


def _reason(error: Exception) -> str:
    """The compiler's own first word of an error, where there is one, else the first line of what torch made of it."""
    lines = str(error).splitlines()
    told = [line.strip() for line in lines if "error: " in line]
    return told[0] if told else first_line(getattr(error, "inner_exception", error))


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


class _BuildClock:
    """Says that a build goes on, how long it has, and what it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._start, self._done = say, 0.0, threading.Event()
        self._speaking = threading.Lock()  # the last word is the end's

    def begin(self, _: Any) -> None:
        self._start, self._done = time.monotonic(), threading.Event()
        threading.Thread(target=self._tick, args=[self._done], name="build clock", daemon=True).start()

    def end(self, _: Any) -> None:
        with self._speaking:
            self._done.set()
        seconds = time.monotonic() - self._start
        if seconds > _WORTH_SAYING_SECONDS:
            self._say(f"compiled in {seconds:.0f} s")

    def _tick(self, done: threading.Event) -> None:
        while not done.wait(_TICK_SECONDS):
            with self._speaking:
                if not done.is_set():
                    self._say(f"compiling: {time.monotonic() - self._start:.0f} s")


@cache
def _tell_of_builds(say: Callable[[str], None]) -> None:
    """Once for all runs of a process."""
    from torch._dynamo.callback import callback_handler  # not at import: it takes a second

    clock = _BuildClock(say)
    callback_handler.register_start_callback(clock.begin)
    callback_handler.register_end_callback(clock.end)
