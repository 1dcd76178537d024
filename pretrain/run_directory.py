"""The directory of a run: its lock, and what is written there once per start.

`config.yaml` (resolved, redacted), `environment.json`, `tokenizer/` (so that a checkpoint can be exported when the
corpus is gone), `status.json` (how the last start ended). Rank 0 alone touches it.
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

from cloze.errors import DiskError, UserError
from cloze.files import write_whole

_PACKAGES = ("cloze", "torch", "deepspeed", "transformers", "tokenizers", "webdataset", "hydra-core", "numpy", "wandb")


class RunDirectory:
    """An open run directory. A second job on it is refused while this one lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("a")
        except OSError as error:
            raise DiskError(f"{path}: cannot be created ({error.strerror}); choose another runs_root") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{path}: another job is training in it; wait for it, or name another run") from None

    def describe(self, config_yaml: str, tokenizer: Path, world_size: int) -> None:
        """Write what the run is made of."""
        try:
            write_whole(self.path / "config.yaml", config_yaml.encode())
            write_whole(self.path / "environment.json", f"{json.dumps(environment(world_size), indent=1)}\n".encode())
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.path}: {error}; free space and run the same command again") from error

    def ranks_before(self) -> int | None:
        """How many ranks the last start had, if there was one."""
        try:
            return int(json.loads((self.path / "environment.json").read_bytes())["world_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_status(self, exit_code: int, step: int) -> None:
        """How this start ended: DeepSpeed's launcher does not always tell."""
        body = {"exit_code": exit_code, "step": step, "time": time.time()}
        with suppress(OSError):  # a full disk was told of; the exit code says the rest
            write_whole(self.path / "status.json", f"{json.dumps(body)}\n".encode())

    def close(self) -> None:
        self._lock.close()


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
        "gpus": devices,
        "world_size": world_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "program": Path(sys.argv[0]).name,
    }
