"""Checkpoints that do not know how they were sharded, and never look finished before they are.

`checkpoints/step-00001000/` holds model.safetensors (fp32 weights by Hugging Face name), optimizer.safetensors
("name.exp_avg", "name.exp_avg_sq"), state.json, config.yaml, and MANIFEST.json (size and sha256 of each, written
last). It is written under a temporary name, fsynced and renamed; LATEST is replaced atomically. Nothing is pickled.

Training waits only while each rank copies its own share to the CPU. In the background every rank writes that share as
fragments keyed by name and range, and rank 0 puts them together: no collective, and no rank needs to know the layout.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloze import ownership, storage
from cloze.errors import UserError
from cloze.files import rename
from cloze.ownership import CHECKPOINT
from pretrain.config import Identity

_NAME = re.compile(r"step-([0-9]{8,})")
MANIFEST = "MANIFEST.json"
_MODEL, _OPTIMIZER, _STATE, _CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
FILES = (_MODEL, _OPTIMIZER, _STATE, _CONFIG)
TEMPORARY = ".writing-"
_MAX_FAILED_SAVES = 3
_MAX_TEXT_BYTES = 1 << 20  # of JSON and YAML: ours have a thousandth of it
_MAX_COUNT = 2**53
_POLL_SECONDS = 0.05
_HURRIED_SECONDS = 10.0  # less than the 30 s that a launcher gives a rank to go

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The dynamic loss scale of fp16, and what decides when it changes."""

    value: float = 1.0
    steady_steps: int = 0  # since the last gradient that was not finite
    hysteresis: int = 1  # so many more of those lower it


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything but tensors that resuming needs. The data's state is the count of samples trained on."""

    step: int
    samples: int
    tokens: int
    seconds: float  # of training, checkpoints and evaluations included
    optimizer_steps: int  # updates applied: fewer than `step` where steps were skipped
    rollbacks: int  # after loss spikes
    loss_scale: LossScale
    identity: Identity
    wandb_id: str | None


class Fragment(NamedTuple):
    """A run of elements of one tensor of the training state."""

    name: str  # of the parameter
    kind: str  # one of KINDS
    start: int  # first element in the flattened tensor
    values: Tensor  # fp32, one-dimensional, on the CPU


class Snapshot(NamedTuple):
    """A checkpoint in memory."""

    state: TrainingState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    config_yaml: str


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: PurePath) -> int:
    """The step that a checkpoint's name tells; -1 if this is no checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0 and path.is_dir()), key=step_of)


def newest_verified(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in which every checksum holds; `report` is told of each that is passed over."""
    for path in reversed(list_checkpoints(folder)):
        faults = verify(path)
        if not faults:
            return path
        report(f"checkpoint {path} is damaged ({faults[0]}); trying the one before it")
    return None


def named_by(key: str, source: str) -> Path | None:
    """The sound checkpoint that `key=source` names: that itself, or a run's newest; None where it is neither.

    Raises `UserError` of a damaged checkpoint, and of a run without a sound one.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        if found := newest_verified(path / "checkpoints", lambda _: None):
            return found
        raise UserError(f"{key}={source}: has no checkpoint that verifies")
    if not (path / "state.json").is_file():
        return None
    if faults := verify(path):
        raise UserError(f"{key}={path}: damaged ({faults[0]}); choose another checkpoint")
    return path


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty when it is whole."""
    try:
        text = _text(path / MANIFEST)
        listed = json.loads(text)["files"]
        expected = {name: (int(listed[name]["bytes"]), str(listed[name]["sha256"])) for name in FILES}
        if text != _manifest_text(expected):
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    faults = []
    for name, (size, digest) in expected.items():
        try:
            if (path / name).stat().st_size != size:
                faults.append(f"{name}: not {size} bytes long")
            elif storage.sha256(path / name) != digest:
                faults.append(f"{name}: its checksum differs")
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def load(path: Path) -> Snapshot:
    """Read a checkpoint that was verified. Raises `UserError` where its content is not what it must be."""
    try:
        state = _parse(TrainingState, json.loads(_text(path / _STATE)), _STATE)
        if step_of(path) not in (-1, state.step):
            raise ValueError(f"{_STATE}: is of step {state.step}")
        weights, moments = load_file(path / _MODEL), load_file(path / _OPTIMIZER)
        _check(weights, _MODEL, {name: value.shape for name, value in weights.items()})
        _check(moments, _OPTIMIZER, {f"{name}.{kind}": weights[name].shape for name in weights for kind in MOMENTS})
        return Snapshot(state, weights, moments, _text(path / _CONFIG))
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({error}); remove it to resume from the one before") from error


def write(folder: Path, snapshot: Snapshot, temporary: Path | None = None) -> Path:
    """Write a checkpoint so that it appears whole or not at all. Raises OSError or SafetensorError."""
    final = path_of(folder, snapshot.state.step)
    temporary = temporary or folder / f"{TEMPORARY}{final.name}"
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        save_file(dict(snapshot.weights), temporary / _MODEL, metadata={"format": "pt"})
        save_file(dict(snapshot.moments), temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps(asdict(snapshot.state), indent=1) + "\n", encoding="utf-8")
        (temporary / _CONFIG).write_text(snapshot.config_yaml, encoding="utf-8")
        files: dict[str, tuple[int, str]] = {}
        for name in FILES:
            (temporary / name).chmod((temporary / _STATE).stat().st_mode)  # safetensors' own is 0600
            fsync(temporary / name)
            files[name] = (temporary / name).stat().st_size, storage.sha256(temporary / name)
        (temporary / MANIFEST).write_text(_manifest_text(files))
        fsync(temporary / MANIFEST)
        for leftover in temporary.glob("share-*"):
            leftover.unlink()
        fsync(temporary)
        if final.exists():  # a damaged one that resuming passed over
            ownership.clear(final, CHECKPOINT)
        rename(temporary, final)
    except BaseException:
        discard(temporary)
        raise
    fsync(folder)
    pointer = folder / ".LATEST.tmp"
    pointer.write_text(final.name + "\n")
    fsync(pointer)
    rename(pointer, folder / "LATEST")
    return final


def discard(temporary: Path) -> None:
    """Remove what was half-written, as far as the disk lets us: `clear_unfinished` does the rest."""
    with suppress(OSError):
        ownership.clear(temporary, CHECKPOINT)


def _manifest_text(files: Mapping[str, tuple[int, str]]) -> str:
    """MANIFEST.json to the byte: from the size and the sha256 of each file."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return json.dumps({"version": 1, "files": listed}, indent=1) + "\n"


def assemble(fragments: Iterable[Fragment], shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Tensor]]:
    """Full tensors by kind and name. Raises ValueError unless the fragments cover every element exactly once."""
    full = {kind: {name: torch.empty(tuple(shape)) for name, shape in shapes.items()} for kind in KINDS}
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {(kind, name): [] for kind in KINDS for name in shapes}
    for name, kind, start, values in fragments:
        full[kind][name].view(-1)[start : start + len(values)] = values
        spans[kind, name].append((start, start + len(values)))
    for (kind, name), found in spans.items():
        found.sort()
        ends = [0, *(end for _, end in found)]
        if [start for start, _ in found] != ends[:-1] or ends[-1] != full[kind][name].numel():
            raise ValueError(f"the ranks' shares of {name} ({kind}) do not fit together")
    return full


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: of a future that was given up."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _remove(path)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed job left half-written. For rank 0, before any rank writes."""
    for path in folder.glob(f"{TEMPORARY}step-*"):
        ownership.clear(path, CHECKPOINT)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int  # the newest ones
    keep_every: int = 0  # those whose step is a multiple of this; 0: none of them
    keep_steps: frozenset[int] = frozenset()

    def removes(self, steps: Sequence[int]) -> list[int]:
        """Which of these ascending steps go."""
        older = set(steps[: -self.keep_last]) - self.keep_steps
        return sorted(step for step in older if not self.keep_every or step % self.keep_every)


def retain(folder: Path, newest: int, rules: Retention) -> list[Path]:
    """Remove checkpoints that the rules do not keep; that of step `newest`, just written, is never among them.

    Later ones are damaged, since resuming passed over them: they do not count.
    """
    found = {step_of(path): path for path in list_checkpoints(folder) if step_of(path) <= newest}
    removed = [found[step] for step in rules.removes(list(found))]
    for path in removed:
        _remove(path)
    return removed


def _remove(path: Path) -> None:
    doomed = path.with_name(TEMPORARY + path.name)  # renamed first: a half-removed one must not look whole
    rename(path, doomed)
    ownership.clear(doomed, CHECKPOINT)


def _parse(kind: type[Any], body: Any, where: str) -> Any:
    """A dataclass from JSON. Raises ValueError for what we do not write; no count, time or scale is negative."""
    if not isinstance(body, dict) or (missing := {field.name for field in fields(kind)} - body.keys()):
        raise ValueError(f"{where}: lacks {min(missing) if isinstance(body, dict) else 'everything'}")
    values = {field.name: body[field.name] for field in fields(kind)}
    for field in fields(kind):
        value, expected = values[field.name], cast(Any, field.type)
        limit = 2**63 if field.name == "seed" else _MAX_COUNT
        if is_dataclass(expected):
            values[field.name] = _parse(cast(type[Any], expected), value, f"{where}: {field.name}")
        elif (
            isinstance(value, bool)
            or not isinstance(value, (int, float) if expected is float else expected)
            or (isinstance(value, int | float) and not 0 <= value < limit)
        ):
            raise ValueError(f"{where}: {field.name} is {value!r:.50}")
    return kind(**values)


def _check(tensors: Mapping[str, Tensor], where: str, shapes: Mapping[str, torch.Size]) -> None:
    """Raises ValueError unless these are all tensors, in fp32, of these shapes, with numbers that can be."""
    if others := tensors.keys() ^ shapes.keys():
        raise ValueError(f"{where}: {min(others)} is missing, or nothing of this model")
    for name, value in tensors.items():
        if value.shape != shapes[name] or value.dtype != torch.float32:
            raise ValueError(f"{where}: {name} is {value.dtype} {list(value.shape)}, not fp32 {list(shapes[name])}")
        least, most = torch.aminmax(value) if value.numel() else (torch.zeros(()), torch.zeros(()))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise ValueError(f"{where}: {name} holds numbers that are not finite")
        if name.endswith(".exp_avg_sq") and least < 0:  # whose root is taken
            raise ValueError(f"{where}: {name} holds negative numbers")


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise ValueError(f"{path.name}: larger than any that we write")
    return path.read_text(encoding="utf-8")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
