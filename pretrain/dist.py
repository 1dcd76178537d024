"""Processes and devices: who am I, how many are we, and the few collectives on host integers."""

import argparse
import atexit
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import psutil
import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore, Store

from cloze.errors import ExitCode, PeerFailed, PeerLost, UserError
from cloze.log import log
from pretrain.heap import keep_freed_memory
from pretrain.launchers import ALONE, adopt
from pretrain.rendezvous import Meeting

T = TypeVar("T")

_GONE = re.compile(r"(?i)connection (?:was )?(?:closed|reset|refused)|broken pipe|remote process exited|socket closed")
_SILENT = logging.Logger("silent", logging.CRITICAL + 1)
_CONTROL_TIMEOUT = timedelta(days=1)  # the watchdog acts long before
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's name and deepspeed's
_STARTED: list["Process"] = []


class Process(NamedTuple):
    """This process among all of the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: torch_dist.ProcessGroup  # gloo: host integers, without touching the device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def log(self) -> logging.Logger:
        """For what every rank knows: rank 0 says it, the others are silent."""
        return log if self.is_main else _SILENT

    def add(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks of a few host numbers, in fp64: exact for counts below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64)
        torch_dist.all_reduce(tensor, group=self.control)
        result: list[float] = tensor.tolist()
        return result

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's few host numbers, by rank."""
        tensor = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch_dist.all_gather(parts, tensor, group=self.control)
        return [part.tolist() for part in parts]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's (picklable) value, by rank: for what is rare, or small."""
        found = [value] * self.world_size
        torch_dist.all_gather_object(found, value, group=self.control)
        return found

    def barrier(self) -> None:
        self.add([0])

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank. Where it raises `UserError` all leave: the first rank that met one tells it."""
        mistake: UserError | None = None
        try:
            result = action()
        except UserError as error:
            mistake = error
        codes = [int(code) for (code,) in self.gather([mistake.exit_code if mistake else 0])]
        if not any(codes):
            return result
        finish()
        first = next(rank for rank, code in enumerate(codes) if code)
        if mistake and first == self.rank:
            mistake.one_rank_only = True  # whoever it is must speak
            raise mistake
        raise PeerFailed("another rank tells why", ExitCode(codes[first]))

    def here_on_main(self, action: Callable[[], T]) -> T | None:
        """Like `on_main` for a result that stays on rank 0; the other ranks get None."""
        results: list[T] = []
        self.on_main(lambda: results.append(action()))
        return results[0] if results else None

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give every rank its (picklable) result, or the same `UserError`."""
        box: list[T | UserError | None] = [None]
        if self.is_main:
            try:
                box[0] = action()
            except UserError as error:
                box[0] = error
        torch_dist.broadcast_object_list(box, src=0, group=self.control)
        result = box[0]
        if isinstance(result, UserError):
            result.one_rank_only = False  # now all have met it
            raise result
        return cast(T, result)


@contextmanager
def translate_peer_loss(told: Callable[[], str] = str) -> Iterator[None]:
    """A collective that fails because another process is gone is one line, with what is `told` of it."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        raise PeerLost(
            f"another rank is gone{told()}: what it says, or the system's log, tells why; the same command "
            "goes on from the last checkpoint"
        ) from error


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))


def environment_rank() -> int:
    """Rank before a process group exists: what the launcher set, else 0."""
    return int(os.environ.get("RANK", "0"))


def check_hostfile() -> None:
    """Raises `UserError` where deepspeed was given a hostfile that is not there: it would train here, alone."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-H", "--hostfile", type=Path)
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()
            if not {Path(word).name for word in words[:4]} & {"deepspeed", "deepspeed.launcher.runner"}:
                continue
            hostfile = parser.parse_known_args(words)[0].hostfile
            if hostfile and not (process.cwd() / hostfile).is_file():
                raise UserError(
                    f"--hostfile={hostfile}: not there, and deepspeed would train on this machine alone; correct it, "
                    "or leave it out"
                )


def start(requested: Callable[[], bool] = lambda: False) -> Process:
    """Join the process group that the launcher's environment describes; alone, a group of one.

    Once for all runs of a process (--multirun has several): DeepSpeed does not outlive the group that it met first.
    Raises `UserError` where the ranks cannot meet, `Stopped` when that is `requested` before they have.
    """
    if not _STARTED:
        _STARTED.append(_start(requested))
    return _STARTED[0]


def _start(requested: Callable[[], bool]) -> Process:
    ranks = adopt() or ALONE
    os.environ.update(ranks.environment)
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {ranks.local_rank}: this node has {torch.cuda.device_count()} GPUs; start that many "
                "processes"
            )
        torch.cuda.set_device(ranks.local_rank)
        device, backend = torch.device("cuda", ranks.local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
        if threads := threads_each(os.environ, torch.get_num_threads()):
            torch.set_num_threads(threads)

    def form(store: Store) -> torch_dist.ProcessGroup:
        torch_dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=_CONTROL_TIMEOUT
        )
        control = torch_dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        assert isinstance(control, torch_dist.ProcessGroup)
        return control

    alone = ranks.world_size == 1
    control = form(HashStore()) if alone else Meeting(ranks, form).run(requested)
    return Process(ranks.rank, ranks.world_size, ranks.local_rank, device, control)


def threads_each(environment: Mapping[str, str], cores: int) -> int | None:
    """Threads of each of several processes on a host of so many cores, where no launcher and no user gave a number.

    torch would start one per core in every process: two processes of two threads take turns on two cores.
    """
    here = next((environment[name] for name in _RANKS_HERE if name in environment), "1")
    if "OMP_NUM_THREADS" in environment or not here.isdecimal() or int(here) < 2:
        return None
    return max(1, cores // int(here))


def finish() -> None:
    """Leave the process group when the process ends; without this some runs end with SIGABRT."""
    atexit.register(lambda: torch_dist.is_initialized() and torch_dist.destroy_process_group())
