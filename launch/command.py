"""The `deepspeed` command of one node: how many processes, on which devices, with which environment.

Pure but for looking at the machine. Overrides stay separate arguments from here to the training process: no shell ever
reads them. Does not know how the command is run.
"""

import base64
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloze.arrival import checksum, sealed
from cloze.errors import UserError, first_line

TRAINING_MODULE = "pretrain.train"
LOCALHOST = "localhost"

_MAX_CPU_PROCESSES = 2  # by default: as fast as one with all cores as threads, within 5%; more only add communication
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Variables that follow a run to its other nodes, by prefix. They travel inside ssh, never on a command line.
_FORWARDED = (
    *("NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "TORCH", "PYTORCH_", "DS_", "OMP_", "MKL_", "TOKENIZERS_", "PYTHON"),
    *("WANDB_", "HF_", "AWS_", "GOOGLE_", "FSSPEC_"),
    *("LD_LIBRARY_PATH", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)


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


@dataclass(frozen=True, kw_only=True)
class NodeStart:
    """What one node is to run. All of it is plain data."""

    overrides: Sequence[str]
    hosts: Mapping[str, int | None]  # name -> processes; None, for a single host: one per GPU, or up to two on a CPU
    module: str = TRAINING_MODULE
    node_rank: int = 0  # which of the hosts this is
    master: str = "127.0.0.1"  # address of rank 0
    port: int = 0


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
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their number of processes, in order, from DeepSpeed's format: `name slots=N` a line, `#` comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"hosts={path}: cannot be read ({first_line(error)}); name a file of lines `host slots=N`"
        ) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], words[-1].removeprefix("slots=")
        if len(words) != 2 or not words[1].startswith("slots=") or not slots.isdecimal() or int(slots) < 1:
            raise UserError(f"{path}:{number}: {line.strip()!r} is not `host slots=N`; correct it")
        if name.startswith("-") or name in hosts:
            raise UserError(f"{path}:{number}: {name}: " + ("is there twice" if name in hosts else "is not a host"))
        hosts[name] = int(slots)
    if not hosts:
        raise UserError(f"{path}: names no host; write a line `host slots=N` for each")
    return hosts


def forwarded(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables that other nodes get: those of libraries that training uses, but not this node's choice of GPUs."""
    prefixes = (*_FORWARDED, *more)
    return {key: value for key, value in environment.items() if key.startswith(prefixes) and key != _VISIBLE}


def plain_deepspeed(overrides: Sequence[str], hosts: Path | None) -> str:
    """What to type to have deepspeed's own launcher train: its pdsh hands the overrides to a shell on every host."""
    hostfile = [f"--hostfile={hosts}"] if hosts and read_hostfile(hosts) else []
    return shlex.join(["deepspeed", *hostfile, "pretrain/train.py", *sealed(overrides)])


def node_command(start: NodeStart, machine: Machine) -> Command:
    """What runs the ranks of one node: deepspeed's own node launcher, which is what its runner starts on each host.

    Training is told the world size, and refuses another. Raises `UserError` when the node has fewer GPUs than that.
    """
    name = list(start.hosts)[start.node_rank]
    procs = start.hosts[name] or len(machine.gpus) or min(_MAX_CPU_PROCESSES, machine.cpus)
    if machine.gpus and procs > len(machine.gpus):
        raise UserError(
            f"{name}: {procs} processes for {len(machine.gpus)} GPUs; ask for that many at most (procs= or hostfile)"
        )
    world = {host: list(range(procs if slots is None else slots)) for host, slots in start.hosts.items()}
    world[name] = list(machine.gpus[:procs]) if machine.gpus else list(range(procs))
    environment: dict[str, str | None] = {_VISIBLE: None}
    if not machine.gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, machine.cpus // procs))
    world_info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    arguments = tuple(start.overrides)
    if start.module == TRAINING_MODULE:
        arguments = (f"world_size={sum(map(len, world.values()))}", *arguments)
        arguments += (checksum(arguments),)
    return Command(
        arguments=(
            *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world_info}"),
            *(f"--node_rank={start.node_rank}", f"--master_addr={start.master}", f"--master_port={start.port}"),
            *("--log_level", "critical", "--no_local_rank", "--module", start.module),
            *arguments,
        ),
        environment=environment,
    )
