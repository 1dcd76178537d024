"""What `launch check` runs on the hosts: facts about one host, then, as ranks of a job, sums and speeds between them.

As `python -m launch.probe` without a rank it answers one line of JSON (training's overrides) with one line of facts; it
imports no torch for that, since a wrong torch is one of the things to find.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import entry
from data_prep.errors import ExitCode, UserError
from data_prep.manifest import NAME as MANIFEST_NAME
from data_prep.schema import CONF
from pretrain.config import TrainConfig

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "webdataset", "hydra-core", "numpy")
_SOURCES = ("data_prep", "pretrain", "launch", "conf")
_NVIDIA_SMI = ("nvidia-smi", "--format=csv,noheader,nounits", "--query-gpu")
_ROUNDS = 5


def facts(overrides: Sequence[str]) -> dict[str, Any]:
    """What must be equal on all hosts, and what must be good on each. Raises `UserError` for a bad configuration."""
    config = entry.compose("train", TrainConfig, overrides)
    manifest = Path(config.data.path) / MANIFEST_NAME
    remote = "://" in config.data.path
    return {
        "equal": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "code": _source_hash(),
            "configuration": _short(repr(config).encode()),
            "data": config.data.path if remote else _short(manifest.read_bytes()) if manifest.exists() else "missing",
        },
        "data_missing": None if remote or manifest.exists() else str(manifest),
        "disk_free_bytes": shutil.disk_usage(_existing(Path(config.runs_root))).free,
        "gpus": _gpus(),
        "time": time.time(),  # the last, for it is compared with when it arrives
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _source_hash() -> str:
    digest = hashlib.sha256()
    for package in _SOURCES:
        root = CONF.parent / package
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _gpus() -> list[dict[str, str]]:
    """Name, memory in use (MiB) and uncorrected memory errors of each GPU, as nvidia-smi tells them."""
    names = ("name", "memory.used", "ecc.errors.uncorrected.volatile.total")
    query = (*_NVIDIA_SMI[:-1], f"{_NVIDIA_SMI[-1]}={','.join(names)}")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not shutil.which(query[0]):
        return []
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def measure(runs_root: Path, hosts: Sequence[str]) -> int:
    """Sum over all ranks, time it, time the links from host to host; rank 0 prints. Raises `UserError` for a fault."""
    import torch
    import torch.distributed as torch_dist

    from pretrain import dist

    process = dist.start()
    node, size = int(os.environ["CROSS_RANK"]), process.world_size
    _check_shared(process, runs_root, hosts[node])
    elements = (64 if process.device.type == "cuda" else 4) * 2**20  # fp32
    ones = torch.full((elements,), float(process.rank + 1), device=process.device)
    seconds = []
    for _ in range(_ROUNDS):
        tensor = ones.clone()
        _wait(process)
        start = time.perf_counter()
        torch_dist.all_reduce(tensor)
        _synchronize(process)
        seconds.append(time.perf_counter() - start)
        if not bool((tensor == size * (size + 1) / 2).all()):
            raise UserError(f"{hosts[node]}: rank {process.rank} got a wrong sum from an all-reduce; test that host")
    bandwidth = 2 * (size - 1) / size * elements * 4 / sorted(seconds)[_ROUNDS // 2]

    nodes: list[int] = [0] * size
    torch_dist.all_gather_object(nodes, node, group=process.control)
    leaders = [nodes.index(number) for number in range(len(hosts))]
    mine = (node, _matmul_flops(process), _link(process, leaders, ones))
    rows: list[tuple[int, float, float | None]] = [mine] * size
    torch_dist.all_gather_object(rows, mine, group=process.control)
    if process.is_main:
        _print_speeds(rows, hosts, bandwidth, size)
    dist.finish()
    return ExitCode.OK


def _check_shared(process: Any, runs_root: Path, host: str) -> None:
    """Checkpoints are written by all ranks and read by rank 0: they must see one file system."""
    token = runs_root / ".cloze-check"

    def write() -> str:
        runs_root.mkdir(parents=True, exist_ok=True)
        token.write_text(str(time.time_ns()))
        return token.read_text()

    written = process.on_main(write)
    seen = token.exists() and token.read_text() == written
    process.barrier()
    process.on_main(lambda: token.unlink())
    if not seen:
        raise UserError(f"runs_root={runs_root}: {host} does not see what the first host writes there; share it")


def _wait(process: Any) -> None:
    _synchronize(process)
    process.barrier()


def _synchronize(process: Any) -> None:
    import torch

    if process.device.type == "cuda":
        torch.cuda.synchronize()


def _matmul_flops(process: Any) -> float:
    """FLOP/s of a square product, the median of some: what tells a slow or throttled device."""
    import torch

    width = 8192 if process.device.type == "cuda" else 512
    kind = torch.bfloat16 if process.device.type == "cuda" else torch.float32
    matrix = torch.ones(width, width, device=process.device, dtype=kind)
    seconds = []
    for _ in range(_ROUNDS + 1):
        _synchronize(process)
        start = time.perf_counter()
        matrix @ matrix
        _synchronize(process)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / sorted(seconds)[_ROUNDS // 2]


def _link(process: Any, leaders: Sequence[int], tensor: Any) -> float | None:
    """Bytes per second from this rank to the first rank of the next host, for the first rank of each."""
    import torch.distributed as torch_dist

    speed = None
    for number, leader in enumerate(leaders):
        follower = leaders[(number + 1) % len(leaders)]
        process.barrier()
        if leader == follower or process.rank not in (leader, follower):
            continue
        for warm_up in (True, False):
            start = time.perf_counter()
            if process.rank == leader:
                torch_dist.send(tensor, follower)
                torch_dist.recv(tensor[:1], follower)
                _synchronize(process)
                speed = None if warm_up else 4 * len(tensor) / (time.perf_counter() - start)
            else:
                torch_dist.recv(tensor, leader)
                torch_dist.send(tensor[:1], leader)
                _synchronize(process)
    return speed


def _print_speeds(
    rows: Sequence[tuple[int, float, float | None]], hosts: Sequence[str], bandwidth: float, size: int
) -> None:
    print(f"\nall-reduce over {size} ranks: right, {bandwidth / 1e9:.2f} GB/s (bus)")
    print(f"{'host':20} {'ranks':>5} {'slowest product':>16} {'link to the next':>17}")
    slowest: list[tuple[float, str]] = []
    for number, host in enumerate(hosts):
        mine = [row for row in rows if row[0] == number]
        flops = min(row[1] for row in mine)
        link = next((row[2] for row in mine if row[2]), None)
        slowest.append((flops, host))
        shown = f"{link / 1e9:.2f} GB/s" if link else ""
        print(f"{host:20} {len(mine):5} {flops / 1e12:9.2f} TFLOP/s {shown:>17}")
    if len(hosts) > 1:
        flops, host = min(slowest)
        print(f"slowest host: {host}, {flops / max(slowest)[0]:.0%} of the fastest")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    if "RANK" in os.environ:
        return entry.guarded(lambda: measure(Path(arguments[0]), arguments[1:]), TrainConfig)
    overrides = json.loads(sys.stdin.readline())
    try:
        found: dict[str, Any] = facts(overrides)
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
