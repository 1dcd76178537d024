"""The ranks of `launch check`: `python -m launch.speed RUNS_ROOT HOST …`, started as training would be.

They see whether runs_root is shared, sum over all ranks and check the sum, and time an all-reduce, a matrix product of
their own and the link from each host to the next. Rank 0 prints.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from data_prep import entry
from data_prep.errors import ExitCode, UserError
from pretrain import dist
from pretrain.config import TrainConfig
from pretrain.dist import Process

_ROUNDS = 5


class Speed(NamedTuple):
    """What a rank measured."""

    node: int
    flops: float  # of a square product, per second
    link: float | None  # bytes per second to the next host, for the first rank of each


def measure(runs_root: Path, hosts: Sequence[str]) -> int:
    """Measure and print. Raises `UserError` for a fault."""
    process = dist.start()
    on_gpu, size = process.device.type == "cuda", process.world_size
    node = int(os.environ["CROSS_RANK"])
    check_shared(process, runs_root, hosts[node])

    ones = torch.full(((64 if on_gpu else 4) * 2**20,), float(process.rank + 1), device=process.device)
    seconds = []
    for _ in range(_ROUNDS):
        total = ones.clone()
        seconds.append(timed(process, partial(torch_dist.all_reduce, total)))
        if not bool((total == size * (size + 1) / 2).all()):
            raise UserError(f"{hosts[node]}: rank {process.rank} got a wrong sum from an all-reduce; test that host")
    bandwidth = 2 * (size - 1) / size * ones.nbytes / median(seconds)

    width, kind = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.ones(width, width, device=process.device, dtype=kind)
    flops = 2 * width**3 / median(timed(process, lambda: matrix @ matrix) for _ in range(_ROUNDS))

    speeds: list[Speed] = [Speed(node, flops, link_speed(process, node, ones))] * size
    torch_dist.all_gather_object(speeds, speeds[0], group=process.control)
    if process.is_main:
        print(
            f"\nall-reduce over {size} ranks: right, {bandwidth / 1e9:.2f} GB/s (bus)\n{table(speeds, hosts)}",
            flush=True,
        )
    dist.finish()
    return ExitCode.OK


def check_shared(process: Process, runs_root: Path, host: str) -> None:
    """Every rank writes its share of a checkpoint, rank 0 reads them: they must see one file system."""
    token = runs_root / ".cloze-check"

    def write() -> str:
        runs_root.mkdir(parents=True, exist_ok=True)
        token.write_text(str(time.time_ns()))
        return token.read_text()

    written = process.on_main(write)
    seen = token.exists() and token.read_text() == written
    process.barrier()
    process.on_main(token.unlink)
    if not seen:
        raise UserError(f"runs_root={runs_root}: {host} does not see what the first host writes there; share it")


def timed(process: Process, action: Callable[[], object]) -> float:
    """Seconds of `action`, which all ranks begin together."""
    process.barrier()
    start = time.perf_counter()
    action()
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def link_speed(process: Process, node: int, tensor: Tensor) -> float | None:
    """Bytes per second from the first rank of this host to that of the next, one link after another. Collective."""
    nodes = [0] * process.world_size
    torch_dist.all_gather_object(nodes, node, group=process.control)
    leaders = [nodes.index(number) for number in range(max(nodes) + 1)]
    speed = None
    for sender, receiver in zip(leaders, leaders[1:] + leaders[:1], strict=True):
        if sender == receiver:
            return None
        seconds = [timed(process, partial(exchange, process.rank, sender, receiver, tensor)) for _ in range(_ROUNDS)]
        if process.rank == sender:
            speed = tensor.nbytes / median(seconds)
    return speed


def exchange(rank: int, sender: int, receiver: int, tensor: Tensor) -> None:
    """Send `tensor`, and wait until it has arrived."""
    if rank == sender:
        torch_dist.send(tensor, receiver)
        torch_dist.recv(tensor[:1], receiver)
    elif rank == receiver:
        torch_dist.recv(tensor, sender)
        torch_dist.send(tensor[:1], sender)


def table(speeds: Sequence[Speed], hosts: Sequence[str]) -> str:
    lines = [f"{'host':20} {'ranks':>5} {'slowest product':>16} {'link to the next':>17}"]
    slowest = []
    for number, host in enumerate(hosts):
        mine = [speed for speed in speeds if speed.node == number]
        flops = min(speed.flops for speed in mine)
        slowest.append((flops, host))
        link = "".join(f"{speed.link / 1e9:.2f} GB/s" for speed in mine if speed.link)
        lines.append(f"{host:20} {len(mine):5} {flops / 1e12:8.2f} TFLOP/s {link:>17}")
    flops, host = min(slowest)
    return "\n".join([*lines, f"slowest host: {host}, {flops / max(slowest)[0]:.0%} of the fastest"])


if __name__ == "__main__":
    sys.exit(entry.guarded(lambda: measure(Path(sys.argv[1]), sys.argv[2:]), TrainConfig))
