"""What all ranks must have alike before the first step, whatever launched them: a difference is one line, exit 64.

Versions, code, configuration, corpus, clocks, and one file system under `runs_root`; and that no machine or GPU is
there twice. Hashes are compared, a few numbers a rank; values are sent only where they differ. Imports no torch.
"""

import hashlib
import importlib.metadata
import ipaddress
import json
import os
import platform
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloze.errors import DiskError, UserError
from cloze.redact import redact
from pretrain.config import TrainConfig, as_data
from pretrain.machine import machine_id

if TYPE_CHECKING:
    from pretrain.dist import Process

MOST_CLOCK_SECONDS = 5.0  # apart
_PACKAGES = ("torch", "deepspeed", "transformers", "cloze")
_SOURCES = ("cloze", "pretrain", "conf")
_PER_NODE = ("data.path", "data.cache_dir", "runs_root")  # a corpus is known by its manifest, runs_root by a token
_TOKEN_SECONDS = 5.0  # a network file system shows a new file a little later
_TOKEN_POLL_SECONDS = 0.1


def agree(process: "Process", config: TrainConfig) -> None:
    """Compare what each rank brings along. Collective. Raises `UserError` on rank 0, `PeerFailed` on the others."""
    if process.world_size == 1:
        return
    facts = {**versions(_PACKAGES), "code": source_hash(_SOURCES), **settings(config)}
    here, gpu = machine_id(), _gpu(process)
    node = int(os.environ.get("CROSS_RANK", "-1"))  # deepspeed's: the number of the host in its hostfile
    process.barrier()
    before = time.time()
    process.barrier()
    after = time.time()
    found = process.gather([before, after, _number(json.dumps(facts)), _number(here), node, _number(gpu) if gpu else 0])
    names, fault = _names(process), None
    if len({row[2] for row in found}) > 1:
        fault = first_difference(process.gather_objects(facts), names)
    elif (pair := same_device(found)) is not None:
        where = f"{names[pair[0]]} and {names[pair[1]]}"
        fault = f"{where}: " + (
            "use one GPU; start as many ranks as there are, with LOCAL_RANK counting on each host"
            if gpu
            else "are one machine under two names; name it once in the hostfile, with slots=2"
        )
    elif (apart := clocks_apart([(row[0], row[1]) for row in found])) is not None:
        fast, slow, seconds = apart
        fault = f"{names[fast]}: its clock is {seconds:.0f} s ahead of that of {names[slow]}; start an NTP client there"
    _tell(process, fault)


def agree_on_corpus(process: "Process", manifests: str, folder: Path) -> None:
    """Compare the corpora by the hashes of their `manifests`, and see that `folder` is one for all. Collective."""
    if process.world_size == 1:
        return
    seen = sees_one_folder(process, folder)
    found = process.gather([_number(manifests), seen])
    names, fault = _names(process), None
    if blind := [rank for rank, row in enumerate(found) if not row[1]]:
        fault = (
            f"{names[blind[0]]}: runs_root={folder.parent}: does not see what {names[0]} writes there; all hosts must "
            "share it, as by NFS: each rank writes its part of a checkpoint"
        )
    elif len({row[0] for row in found}) > 1:
        facts = process.gather_objects({"the corpus (its manifest's sha256)": manifests})
        fault = first_difference(facts, names)
    _tell(process, fault)


def sees_one_folder(process: "Process", folder: Path) -> bool:
    """Whether this rank can read what rank 0 writes into `folder`. Collective. Raises `DiskError` on all ranks."""
    written = process.on_main(lambda: _write_token(folder))
    token = folder / f".cloze-{written}"
    end = time.monotonic() + _TOKEN_SECONDS
    while not (seen := _reads(token, written)) and time.monotonic() < end:
        time.sleep(_TOKEN_POLL_SECONDS)
    process.barrier()
    if process.is_main:
        token.unlink(missing_ok=True)
    return seen


def _write_token(folder: Path) -> str:
    written = secrets.token_hex(8)  # a name that is nobody else's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".cloze-{written}").write_text(written)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror}; free space there, or choose another runs_root") from error
    return written


def _reads(token: Path, written: str) -> bool:
    with suppress(OSError):
        os.listdir(token.parent)  # has NFS look again  # noqa: PTH208
        return token.read_text() == written
    return False


def settings(config: TrainConfig) -> dict[str, str]:
    """The resolved configuration as `key: value`, without secrets and without what each node may have for itself."""
    flat = dict(_flat(redact(as_data(asdict(config)))))
    return {key: value for key, value in flat.items() if key not in _PER_NODE}


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    else:
        yield key, json.dumps(value, ensure_ascii=False)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of packages; "missing" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def source_hash(packages: Iterable[str]) -> str:
    """Of the Python and YAML files of our own packages, as they lie here."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(__file__).resolve().parents[1] / package
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
            digest.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def first_difference(found: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """One line of what differs first; what most have is right, of two the first. There must be a difference."""
    keys = list(dict.fromkeys(key for facts in found for key in facts))
    differing = [key for key in keys if len({facts.get(key) for facts in found}) > 1]
    key = differing[0]
    right, _ = Counter(facts.get(key) for facts in found).most_common(1)[0]
    like = next(number for number, facts in enumerate(found) if facts.get(key) == right)
    odd = next(number for number, facts in enumerate(found) if facts.get(key) != right)
    others = ", ".join(differing[1:4]) + (", …" if len(differing) > 4 else "")
    also = f" (and {others})" if others else ""
    its, theirs = (facts.get(key, "not there") for facts in (found[odd], found[like]))
    return f"{names[odd]}: {key} is {its}, {names[like]} has {theirs}{also}; make them equal"


def clocks_apart(times: Sequence[tuple[float, float]]) -> tuple[int, int, float] | None:
    """(rank that is ahead, rank that is behind, seconds), for clocks too far apart.

    `times`: before and after a moment that all share. Ranks may have waited long on either side of it, so only what
    cannot be otherwise counts: one clock showed more before the moment than another after it.
    """
    fast = max(range(len(times)), key=lambda rank: times[rank][0])
    slow = min(range(len(times)), key=lambda rank: times[rank][1])
    seconds = times[fast][0] - times[slow][1]
    return (fast, slow, seconds) if seconds > MOST_CLOCK_SECONDS else None


def same_device(found: Sequence[Sequence[float]]) -> tuple[int, int] | None:
    """Two ranks on one GPU, or on one machine that a hostfile names twice; `found` as gathered by `agree`."""
    seen: dict[tuple[float, ...], tuple[int, float]] = {}
    for rank, (*_, machine, node, gpu) in enumerate(found):
        other, other_node = seen.setdefault((gpu,) if gpu else (machine, 0.0), (rank, node))
        named_twice = -1 not in (node, other_node) and node != other_node and not _is_local_master()
        if other != rank and (gpu or named_twice):
            return other, rank
    return None


def _is_local_master() -> bool:
    """Whether who started us says that all ranks are on this machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(os.environ.get("MASTER_ADDR", "")).is_loopback
    return os.environ.get("MASTER_ADDR") == "localhost"


def _gpu(process: "Process") -> str:
    if process.device.type != "cuda":
        return ""
    from torch import cuda

    return str(cuda.get_device_properties(process.device).uuid)


def _number(text: str) -> float:
    """A hash that a float holds to the last bit."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def _names(process: "Process") -> list[str]:
    """The ranks, as people look for them. Collective."""
    return [f"{host} (rank {rank})" for rank, host in enumerate(process.gather_objects(socket.gethostname()))]


def _tell(process: "Process", fault: str | None) -> None:
    """Where rank 0 has a `fault` it raises it, and the others leave without a word. Collective."""

    def complain() -> None:
        if fault and process.is_main:
            raise UserError(fault)

    process.together(complain)
