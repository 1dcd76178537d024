"""The `deepspeed` command for this machine: how many processes, on which devices, with which environment.

Pure but for looking at the machine. Overrides stay separate arguments from here to the training process: no shell ever
reads them. Does not know how the command is run.
"""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.errors import UserError

TRAINING_MODULE = "pretrain.train"

_MAX_CPU_PROCESSES = 2  # by default: more ranks share the same cores and only add communication
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine has to train on."""

    gpus: tuple[int, ...]  # indices; empty on a machine without
    cpus: int  # cores that this process may use


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line and the environment variables that it sets (None: removes)."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str | None]

    def full_environment(self) -> dict[str, str]:
        merged = {**os.environ, **self.environment}
        return {name: value for name, value in merged.items() if value is not None}

    def __str__(self) -> str:
        """What to type into a shell to run it."""
        unset = [f"-u {name}" for name, value in self.environment.items() if value is None and name in os.environ]
        values = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items() if value is not None]
        return " ".join([*(["env", *unset] if unset else []), *values, shlex.join(self.arguments)])


def this_machine() -> Machine:
    """GPUs (those that CUDA_VISIBLE_DEVICES leaves) and cores. Raises `UserError` for GPUs named by UUID."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get(_VISIBLE)
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "":
        return Machine(gpus=(), cpus=cpus)
    import torch  # seconds: only where its answer is needed

    count = torch.cuda.device_count()
    if count and visible:
        try:
            return Machine(gpus=tuple(int(index) for index in visible.split(",")), cpus=cpus)
        except ValueError:
            raise UserError(f"{_VISIBLE}={visible}: deepspeed takes indices only; name the GPUs as 0,1,…") from None
    return Machine(gpus=tuple(range(count)), cpus=cpus)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def deepspeed_command(
    overrides: Sequence[str],
    machine: Machine,
    *,
    procs: int | None,
    port: int,
    module: str = TRAINING_MODULE,
) -> Command:
    """The command that trains on `machine` with `procs` processes: by default one per GPU, or up to two on a CPU.

    deepspeed's own choices are all overridden: it would read a cluster's /job/hostfile, count NUMA nodes for CPU
    processes, and widen CUDA_VISIBLE_DEVICES to the first GPUs of the machine. Raises `UserError` when `procs` is more
    than the machine has GPUs.
    """
    num_procs = procs or len(machine.gpus) or min(_MAX_CPU_PROCESSES, machine.cpus)
    environment: dict[str, str | None] = {_VISIBLE: None}
    if machine.gpus:
        if num_procs > len(machine.gpus):
            raise UserError(f"procs={num_procs}: this machine has {len(machine.gpus)} GPUs; ask for that many at most")
        devices = ["--include", "localhost:" + ",".join(map(str, machine.gpus[:num_procs]))]
    else:
        devices = ["--num_gpus", str(num_procs)]
        environment["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cpus // num_procs))
    return Command(
        arguments=(
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", os.devnull, *devices, "--master_port", str(port)),
            *("--log_level", "critical", "--no_local_rank", "--module", module),
            *overrides,
        ),
        environment=environment,
    )
