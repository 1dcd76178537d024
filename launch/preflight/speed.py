"""The ranks of `launch check`: `python -m launch.preflight.speed RUNS_ROOT HOST …`, started as training would be.

They see whether runs_root is shared, sum over all ranks and check the sum, and time an all-reduce, a matrix product of
their own and the link from each host to the next. Rank 0 prints, also where they cannot reach each other: an error is
then as likely as a silence, and each rank may meet another one.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as torch_dist
from torch import Tensor

from cloze import cli
from cloze.errors import ExitCode, PeerFailed, UserError, first_line
from cloze.log import log
from pretrain import dist
from pretrain.agreement import sees_one_folder
from pretrain.config import TrainConfig
from pretrain.dist import Process
from pretrain.rendezvous import NoConnection
from pretrain.watchdog import Watchdog

_ROUNDS = 5
_PATIENCE_SECONDS = 60.0  # for a measurement
_START_SECONDS = 120.0  # for the ranks to find each other: some hosts import torch faster than others
_AFTER_RANK_0_SECONDS = 20.0


class Speed(NamedTuple):
    """What a rank measured."""

    node: int
    flops: float  # of a square product, per second
    link: float | None  # bytes per second to the next host, for the first rank of each


class Network(Watchdog):
    """The way between the ranks. Where it fails or is silent, rank 0 says so in one line, and all leave with 64."""

    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__(_PATIENCE_SECONDS, Path(), dist.environment_rank(), slow_seconds=_START_SECONDS)
        self._hosts = hosts

    def give_up(self, idle_seconds: float, limit: float) -> None:
        self.leave(f"silence for {limit:.0f} s")

    def leave(self, reason: str) -> NoReturn:
        """End this process; the others' launchers then end what is left."""
        if self._rank:
            # Who leaves first has its launcher end rank 0, which may have met a silence where this one met an error.
            time.sleep(self._limit + _AFTER_RANK_0_SECONDS)
        else:
            name = next((key for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if key in os.environ), None)
            log.error(
                f"{', '.join(self._hosts)}: no connection between their ranks over "
                f"{f'{name}={os.environ[name]}' if name else 'the interface of the host name'} ({reason}); see that no "
                "firewall is between them, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that is"
            )
        os._exit(ExitCode.USAGE)

    def timed(self, process: Process, action: Callable[[], object]) -> float:
        """Seconds of `action`, which all ranks begin together."""
        process.barrier()
        start = time.perf_counter()
        action()
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        self.tick()
        return time.perf_counter() - start


def main(runs_root: Path, hosts: Sequence[str]) -> int:
    """Measure and print. Raises `UserError` for a fault."""
    network = Network(hosts)
    try:
        measure(network, runs_root, hosts)
    except RuntimeError as error:  # whatever torch.distributed raises
        network.leave(first_line(error))
    network.close()
    dist.finish()
    return ExitCode.OK


def measure(network: Network, runs_root: Path, hosts: Sequence[str]) -> None:
    process = joined(network)
    on_gpu, size = process.device.type == "cuda", process.world_size
    node = int(os.environ["CROSS_RANK"])
    raise_everywhere(process, shared_folder_fault(process, runs_root, hosts[node]))

    ones = torch.full(((64 if on_gpu else 4) * 2**20,), float(process.rank + 1), device=process.device)
    seconds, right = [], True
    for _ in range(_ROUNDS):
        total = ones.clone()
        seconds.append(network.timed(process, partial(torch_dist.all_reduce, total)))
        right = right and bool((total == size * (size + 1) / 2).all())
    wrong = f"{hosts[node]}: rank {process.rank} got a wrong sum from an all-reduce; test that host"
    raise_everywhere(process, None if right else wrong)
    bandwidth = 2 * (size - 1) / size * ones.nbytes / median(seconds)

    width, kind = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    matrix = torch.ones(width, width, device=process.device, dtype=kind)
    flops = 2 * width**3 / median(network.timed(process, lambda: matrix @ matrix) for _ in range(_ROUNDS))

    speeds: list[Speed] = [Speed(node, flops, link_speed(network, process, node, ones))] * size
    torch_dist.all_gather_object(speeds, speeds[0], group=process.control)
    if process.is_main:
        print(
            f"\nall-reduce over {size} ranks: right, {bandwidth / 1e9:.2f} GB/s (bus)\n{table(speeds, hosts)}",
            flush=True,
        )


def joined(network: Network) -> Process:
    """The group, or the end of this process where there is none to be had."""
    try:
        return dist.start()
    except NoConnection as error:
        network.leave(error.reason)
    except PeerFailed as error:
        network.leave(str(error))


def raise_everywhere(process: Process, fault: str | None) -> None:
    """Where any rank has a fault, rank 0 raises it, and the others leave without a word. Collective."""
    faults = [fault] * process.world_size
    torch_dist.all_gather_object(faults, fault, group=process.control)
    for found in filter(None, faults):
        raise UserError(found) if process.is_main else PeerFailed(found)


def shared_folder_fault(process: Process, runs_root: Path, host: str) -> str | None:
    """Every rank writes its share of a checkpoint, rank 0 reads them: they must see one file system. Collective."""
    seen = sees_one_folder(process, runs_root)
    return None if seen else f"runs_root={runs_root}: {host} does not see what the first host writes there; share it"


def link_speed(network: Network, process: Process, node: int, tensor: Tensor) -> float | None:
    """Bytes per second from the first rank of this host to that of the next, one link after another. Collective."""
    nodes = [0] * process.world_size
    torch_dist.all_gather_object(nodes, node, group=process.control)
    leaders = [nodes.index(number) for number in range(max(nodes) + 1)]
    speed = None
    for sender, receiver in zip(leaders, leaders[1:] + leaders[:1], strict=True):
        if sender == receiver:
            return None
        send = partial(exchange, process.rank, sender, receiver, tensor)
        seconds = [network.timed(process, send) for _ in range(_ROUNDS)]
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
    products, links = [], []
    for number, host in enumerate(hosts):
        mine = [speed for speed in speeds if speed.node == number]
        products.append((min(speed.flops for speed in mine), host))
        links += [(speed.link, f"{host} to {hosts[(number + 1) % len(hosts)]}") for speed in mine if speed.link]
        link = "".join(f"{speed.link / 1e9:.2f} GB/s" for speed in mine if speed.link)
        lines.append(f"{host:20} {len(mine):5} {products[-1][0] / 1e12:8.2f} TFLOP/s {link:>17}")
    for what, found in (("host", products), ("link", links)):
        if found:
            lines.append(f"slowest {what}: {min(found)[1]}, {min(found)[0] / max(found)[0]:.0%} of the fastest")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: main(Path(sys.argv[1]), sys.argv[2:]), TrainConfig))
