"""Which rank this process is, as whatever started it says: by a table of launchers, from the environment alone.

deepspeed, torchrun, accelerate and Kubernetes' PyTorchJob set torch's own variables; mpirun, srun and SageMaker have
others, which are adopted under torch's names. What an interactive shell or another job has left is told from that by
what it lacks: a launcher's daemon among our parents, or a variable. Then one process trains, and says so. Pure but for
`adopt` and `parents`. Does not know how ranks meet (rendezvous.py).
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from cloze.errors import UserError
from cloze.log import log
from pretrain.hostlist import hosts_of

Environment = Mapping[str, str]

_TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
_LOOPBACK = "127.0.0.1"
_PORT = 29_500  # where the launcher names no job, by which several on one machine could be told apart
_FIRST_PORT, _PORTS = 20_000, 12_000  # below those that systems give away
_MOST_PORT = 65_535
_FIRST_NAMESPACE = "pid:[4026531836]"  # of processes: Linux's own number for the one outside of containers


class Ranks(NamedTuple):
    """This process among all of the job."""

    rank: int
    world_size: int
    local_rank: int
    master: str  # where the others find rank 0
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """Under torch's names."""
        values = (self.rank, self.world_size, self.master, self.port, self.local_rank)
        return dict(zip(_TORCH, map(str, values), strict=True))


ALONE = Ranks(0, 1, 0, _LOOPBACK, _PORT)


class Found(NamedTuple):
    """What an environment says: `ranks`, or None for a process that trains alone; then a `note`, if that surprises."""

    ranks: Ranks | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A launcher with variables of its own."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    start: str  # how to start several ranks with it
    give: str  # how it is told a variable for all ranks
    lives: Callable[[Environment, frozenset[str] | None], bool]  # of these names of our parents; None: not known
    master: Callable[[Environment], str | None]
    job: Callable[[Environment], str]  # the same for all ranks of a job, another for the next job; "" if none is known


def _started_by(*daemons: str) -> Callable[[Environment, frozenset[str] | None], bool]:
    return lambda environment, names: names is None or bool(names & {*daemons})


def _lives_in_slurm(environment: Environment, names: frozenset[str] | None) -> bool:
    """Whether this is a task of a step, and no batch script, no shell of salloc or `srun --pty`, no copy of those.

    Who sets SLURM_PROCID by hand names no job and no process.
    """
    in_step = "SLURM_STEP_NODELIST" in environment or "SLURM_JOB_ID" not in environment
    started = names is None or "slurmstepd" in names or "SLURM_TASK_PID" not in environment
    return in_step and started and "SLURM_PTY_PORT" not in environment


def _slurm_master(environment: Environment) -> str | None:
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == "1":
        return _LOOPBACK
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodelist = next((environment[name] for name in names if name in environment), None)
    return next(hosts_of(nodelist)) if nodelist else None


def _openmpi_master(environment: Environment) -> str | None:
    """mpirun's own host, by the address that it gives its daemons: rank 0 is there unless a hostfile says otherwise."""
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment.get("OMPI_COMM_WORLD_SIZE"):
        return _LOOPBACK
    found = re.findall(r"\d+\.\d+\.\d+\.\d+", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    return next((address for address in found if not address.startswith("127.")), None)


def _pmi_master(environment: Environment) -> str | None:
    one_node = environment.get("MPI_LOCALNRANKS") == environment.get("PMI_SIZE")
    return _LOOPBACK if one_node else None


LAUNCHERS = (
    Launcher(
        name="mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        start="mpirun -np N",
        give="mpirun -x {}",
        lives=_started_by("mpirun", "mpiexec", "orterun", "orted", "prterun", "prted"),
        master=_openmpi_master,
        job=lambda environment: environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_orte_hnp_uri", "")),
    ),
    Launcher(
        name="mpiexec (MPICH, Intel MPI)",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        start="mpiexec -n N",
        give="mpiexec -genv {}",
        lives=_started_by("mpiexec", "mpiexec.hydra", "mpirun", "hydra_pmi_proxy", "pmi_proxy", "hydra_bstrap_pr"),
        master=_pmi_master,
        job=lambda environment: environment.get("PMI_PORT", ""),
    ),
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        world_size="SLURM_NTASKS",
        local_rank="SLURM_LOCALID",
        start="srun",
        give="export {} before srun",
        lives=_lives_in_slurm,
        master=_slurm_master,
        job=lambda environment: ".".join(environment.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP")).strip(
            "."
        ),
    ),
)
"""In this order: mpirun starts its daemons by srun, and srun sets PMI_* for MPI."""


def ranks_of(environment: Environment, names: frozenset[str] | None) -> Found:
    """The rank that `environment` makes of a process whose parents have these `names` (None: they are not known).

    Raises `UserError` for a rank that cannot be: it would train a second time what rank 0 trains, or wait for ever.
    """
    if _is_complete(environment):
        return Found(_torch_ranks(environment))
    claims = [each for each in LAUNCHERS if _claims(each, environment)]
    for launcher in claims:
        if launcher.rank in environment and launcher.lives(environment, names):
            return Found(_adopted(launcher, environment))
    if ranks := _sagemaker_ranks(environment):
        return Found(ranks)
    for launcher in claims:
        said = f"{launcher.world_size}={environment.get(launcher.world_size, '')}"
        if environment.get(launcher.rank, "0") != "0":
            raise UserError(
                f"{launcher.rank}={environment[launcher.rank]} of {said}, but {launcher.name} did not start this "
                f"process; start all by {launcher.start}, or unset {launcher.rank}"
            )
        return Found(
            None, f"{said} is not for this process: it trains alone; for several ranks start them by {launcher.start}"
        )
    if "RANK" in environment:
        missing = [name for name in _TORCH[:4] if not environment.get(name)]
        if "WORLD_SIZE" in environment and environment["RANK"] != "0":
            raise UserError(
                f"RANK={environment['RANK']}, but {', '.join(missing)} not set: start it by a launcher, or unset RANK"
            )
        return Found(None, f"RANK={environment['RANK']} is left over ({', '.join(missing)} not set): this trains alone")
    return Found(None)


def _is_complete(environment: Environment) -> bool:
    needed = _TORCH[:2] if environment.get("WORLD_SIZE") == "1" else _TORCH[:4]
    return all(environment.get(name) for name in needed)


def _claims(launcher: Launcher, environment: Environment) -> bool:
    """Whether there should be several ranks."""
    return environment.get(launcher.world_size, "1") != "1"


def _torch_ranks(environment: Environment) -> Ranks:
    rank, size = (_whole(name, environment) for name in _TORCH[:2])
    like = (each for each in LAUNCHERS if environment.get(each.rank) == str(rank) and each.local_rank in environment)
    local = "LOCAL_RANK" if "LOCAL_RANK" in environment else next((each.local_rank for each in like), None)
    return _checked(
        Ranks(
            rank,
            size,
            _whole(local, environment) if local else 0,
            environment.get("MASTER_ADDR", "") or _LOOPBACK,
            _whole("MASTER_PORT", environment) if environment.get("MASTER_PORT") else _PORT,
        ),
        "RANK",
        "WORLD_SIZE",
    )


def _adopted(launcher: Launcher, environment: Environment) -> Ranks:
    master = environment.get("MASTER_ADDR") or launcher.master(environment)
    if master is None:
        raise UserError(
            f"{launcher.name}: does not tell where rank 0 is; name its host: {launcher.give.format('MASTER_ADDR=HOST')}"
        )
    job = launcher.job(environment)
    port = _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS if job else _PORT
    ranks = Ranks(
        _whole(launcher.rank, environment),
        _whole(launcher.world_size, environment),
        _whole(launcher.local_rank, environment) if launcher.local_rank in environment else 0,
        master,
        _whole("MASTER_PORT", environment) if environment.get("MASTER_PORT") else port,
    )
    return _checked(ranks, launcher.rank, launcher.world_size)


def _sagemaker_ranks(environment: Environment) -> Ranks | None:
    """One process a host, which is what SageMaker starts unless it is told to use torchrun."""
    if not {"SM_HOSTS", "SM_CURRENT_HOST"} <= environment.keys():
        return None
    try:
        hosts = [str(host) for host in json.loads(environment["SM_HOSTS"])]
        rank = hosts.index(environment["SM_CURRENT_HOST"])
    except (ValueError, TypeError):
        raise UserError(f"SM_HOSTS={environment['SM_HOSTS']}: does not name SM_CURRENT_HOST; correct it") from None
    gpus = environment.get("SM_NUM_GPUS", "0")
    if gpus not in ("0", "1"):
        raise UserError(
            f"SM_NUM_GPUS={gpus}: SageMaker started one process for them; give its estimator "
            "distribution={'torch_distributed': {'enabled': True}}, which starts one for each"
        )
    if len(hosts) == 1:
        return None
    return Ranks(rank, len(hosts), 0, environment.get("MASTER_ADDR") or hosts[0], _PORT)


def _checked(ranks: Ranks, rank: str, size: str) -> Ranks:
    if ranks.port > _MOST_PORT:
        raise UserError(f"MASTER_PORT={ranks.port}: there are ports up to {_MOST_PORT}; name one of those")
    if not ranks.rank < ranks.world_size:
        raise UserError(
            f"{rank}={ranks.rank}: of {size}={ranks.world_size} ranks there are 0 to {ranks.world_size - 1}"
        )
    return ranks


def _whole(name: str, environment: Environment) -> int:
    if not environment[name].isdecimal():
        raise UserError(f"{name}={environment[name]}: is not a whole number; unset it, or start this by a launcher")
    return int(environment[name])


def port_remedy(environment: Environment, port: int) -> str:
    """What to do to have the ranks meet at `port`."""
    if "CROSS_SIZE" in environment:
        return f"add --master_port={port} after `deepspeed`"
    if "TORCHELASTIC_RUN_ID" in environment:
        return f"add --master-port={port} after `torchrun`"
    for launcher in LAUNCHERS:
        if environment.get(launcher.rank) == environment.get("RANK"):
            return launcher.give.format(f"MASTER_PORT={port}")
    return f"set MASTER_PORT={port} for all ranks"


def parents() -> frozenset[str] | None:
    """The names of the processes that this one descends from; None in a container of its own, which hides them."""
    try:
        if str(Path("/proc/self/ns/pid").readlink()) != _FIRST_NAMESPACE:
            return None
        return frozenset(process.name() for process in psutil.Process().parents())
    except (OSError, psutil.Error):
        return None


def adopt() -> Ranks | None:
    """Put into this process's environment what its launcher means, in torch's names; None for one that trains alone.

    What is not meant for this process is removed.
    """
    ranks, note = ranks_of(os.environ, parents())
    if ranks:
        os.environ.update(ranks.environment)
        return ranks
    if note:
        log.warning(note)
    left = (name for each in LAUNCHERS for name in (each.rank, each.world_size, each.local_rank))
    for name in (*_TORCH, *left):
        os.environ.pop(name, None)
    return None
