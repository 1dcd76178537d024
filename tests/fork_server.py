"""Starts training processes without paying for their imports: `support.Ranks` talks to it over a pipe.

The imports of `pretrain.train` (not the module itself) are made once; every request forks a process that becomes, in
its own session, what `python -m pretrain.train …` is: own environment, arguments, directory and standard streams. It
ends as any interpreter does, but for the half second that it takes to take all modules apart: tests/e2e has those.

In: one JSON object a line, {"argv", "env", "cwd", "stdout", "stderr", "code", "before"}. Out: the process id, a line
each. When the process ends, its exit code goes into the file `code`. `before` is Python to run in it first: a fault to
inject.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import sys
import threading
from pathlib import Path
from typing import Any

MODULES = (
    "cloze.cli", "hydra._internal.hydra", "torch.utils.data", "transformers.models.auto.tokenization_auto",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer", "pretrain.checkpoint", "pretrain.engine.engine", "pretrain.loop",
    "pretrain.model.bert", "pretrain.run_directory", "yaml",
)  # fmt: skip


def warm_up() -> None:
    """Do once what every process would do again: Hydra learns its grammar, DeepSpeed tries which operators build."""
    from deepspeed import ops

    from cloze import cli
    from pretrain.config import TrainConfig

    cli.compose("train", TrainConfig, ["run=r", "data.path=d", "model=tiny", "data.workers=0", "optim.lr=1e-3"])
    ops.__compatible_ops__  # noqa: B018


def become(request: dict[str, Any]) -> None:
    """Be the process that was asked for. Returns never: raises SystemExit, or what the program raises."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["train.py", *request["argv"]]
    exec(request["before"], {})
    runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
    sys.exit(0)


def leave() -> None:
    """End the process that became a program: print what it raised, wait for its threads, run its exit functions."""
    kind, error, trace = sys.exc_info()
    code = 1
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif kind and error:
        sys.excepthook(kind, error, trace)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def note(path: Path, code: int) -> None:
    path.with_suffix(".tmp").write_text(str(code))
    path.with_suffix(".tmp").rename(path)


def serve(answers: int) -> dict[str, Any]:
    """Answer until the client is gone. A request returns in the forked process, with what it shall become."""
    children: dict[int, Path] = {}
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            if selector.select(0.02):
                data = os.read(0, 1 << 16)
                if not data:
                    sys.exit(0)
                *lines, waiting = (waiting + data).split(b"\n")
                for line in lines:
                    request: dict[str, Any] = json.loads(line)
                    pid = os.fork()
                    if pid == 0:
                        os.close(answers)
                        return request
                    children[pid] = Path(request["code"])
                    os.write(answers, f"{pid}\n".encode())
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    note(children.pop(pid), os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    for module in MODULES:
        importlib.import_module(module)
    warm_up()
    assert threading.active_count() == 1, "a forked copy of a threaded process may hang"
    gc.collect()
    gc.freeze()  # forked copies then leave what is here alone
    request = serve(answers)
    try:
        become(request)
    finally:
        leave()
