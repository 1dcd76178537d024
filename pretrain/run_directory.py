"""The directory of a run: its lock, and what is written there once per start.

`config.yaml` (resolved, redacted), `environment.json`, `tokenizer/` (so that a checkpoint can be exported when the
corpus is gone), `status.json` (how the last start ended). Rank 0 alone touches it. Its mark also keeps the newest step
that was ever saved: a run whose checkpoints are gone does not start again over what it has trained.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from cloze import ownership
from cloze.arrival import opened, without_local_rank
from cloze.errors import ORDERLY_ENDS, DiskError, UserError
from cloze.files import json_object, parsed, write_whole
from cloze.ownership import RUN
from cloze.redact import redact_overrides
from pretrain.checkpoint.format import list_checkpoints, step_of, verify
from pretrain.precision import cpu_name

_OURS = ("config.yaml", "environment.json", "metrics.jsonl", "status.json", "tokenizer", "wandb_id", "skipped.jsonl")
_PACKAGES = ("cloze", "torch", "deepspeed", "transformers", "tokenizers", "webdataset", "hydra-core", "numpy", "wandb")

_LOCK_SECONDS = 5.0
_LOCK_POLL_SECONDS = 0.05


class RunDirectory:
    """An open run directory. A second job on it is refused while this one lives, and so is what is no run of ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._started: str | None = None  # as environment.json has it
        refuse_foreign(path)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("a")
        except OSError as error:
            raise DiskError(f"{path}: cannot be created ({error.strerror}); choose another runs_root") from error
        if not _locked(self._lock):
            self._lock.close()
            raise UserError(f"{path}: another job is training in it; wait for it, or name another run")
        try:
            self.note_saved(0)
        except OSError as error:
            raise DiskError(f"{path}: {error}; free space and run the same command again") from error

    def note_saved(self, step: int) -> None:
        """Keep that a checkpoint of this step was written. Raises OSError."""
        ownership.mark(self.path, RUN, saved_step=max(step, saved_step(self.path)))

    def describe(self, config_yaml: str, tokenizer: Path, world_size: int) -> None:
        """Write what the run is made of."""
        known = environment(world_size)
        self._started = known["started"]
        try:
            write_whole(self.path / "config.yaml", config_yaml.encode())
            write_whole(self.path / "environment.json", f"{json.dumps(known, indent=1)}\n".encode())
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.path}: {error}; free space and run the same command again") from error

    def ranks_before(self) -> int | None:
        """How many ranks the last start had, if there was one."""
        try:
            return int(parsed((self.path / "environment.json").read_bytes())["world_size"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def write_status(self, exit_code: int, step: int, verdict: str | None = None) -> None:
        """How this start ended: DeepSpeed's launcher does not always tell. `verdict`: what is wrong with the model.

        `started` tells which start it was: clocks that jump do not.
        """
        body: dict[str, Any] = {"exit_code": exit_code, "step": step, "time": time.time()}
        body |= {key: value for key, value in (("started", self._started), ("verdict", verdict)) if value}
        with suppress(OSError):  # a full disk was told of; the exit code says the rest
            write_whole(self.path / "status.json", f"{json.dumps(body)}\n".encode())

    def close(self) -> None:
        self._lock.close()


def refuse_foreign(path: Path) -> None:
    """Raises `UserError` where what a run writes is there, and no run of ours wrote it."""
    if ownership.is_of(path, RUN):
        return
    found = [name for name in _OURS if (path / name).exists()]
    found += [f"checkpoints/{each.name}" for each in sorted(path.glob("checkpoints/*"))]
    if found:
        raise UserError(f"{path}: holds {found[0]}, which no run of Cloze wrote; name another run or runs_root")


def saved_step(path: Path) -> int:
    """The newest step of which a checkpoint was ever written in this run; 0 where none was.

    The mark tells it, or a checkpoint's name. Earlier versions left no mark: there an orderly end, or metrics from
    after the second save (which waits for the first), say so.
    """
    known = ownership.marked(path, RUN) or {}
    steps = [step_of(each) for each in list_checkpoints(path / "checkpoints")]
    if type(known.get("saved_step")) is int:
        return max(int(known["saved_step"]), *steps, 0)
    status = json_object(path / "status.json")
    if type(status.get("exit_code")) is int and status["exit_code"] in ORDERLY_ENDS and type(status.get("step")) is int:
        steps.append(status["step"])
    with suppress(
        OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError, yaml.YAMLError, RecursionError
    ):
        last = parsed((path / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
        every = yaml.safe_load((path / "config.yaml").read_bytes())["checkpoint"]["every"]
        steps.append(last // every * every - every if every and last > 2 * every else 0)
    return max(steps, default=0)


def refuse_lost(path: Path) -> None:
    """Raises `UserError` of a run that has no sound checkpoint, but had some: to start again would hide that."""
    if not (step := saved_step(path)):
        return
    damaged = [f"{each.name}: {verify(each)[0]}" for each in reversed(list_checkpoints(path / "checkpoints"))]
    what = "damaged: " + "; ".join(damaged[:3]) if damaged else "there is none"
    raise UserError(
        f"{path}: was saved up to step {step}, and no checkpoint in {path / 'checkpoints'} can be read ({what}); put "
        "one back from a copy, or name another run, with init_from=WEIGHTS to go on from other weights"
    )


def environment(world_size: int) -> dict[str, Any]:
    """Versions and machine, for whoever reads the run later."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": cpu_name(),
        "gpus": devices,
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "program": Path(sys.argv[0]).name,
        "overrides": redact_overrides(opened(without_local_rank(sys.argv[1:]))),
    }


def _locked(file: IO[str]) -> bool:
    """Take the lock, patiently: a process that was killed holds it until the system has taken its memory back."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return True
