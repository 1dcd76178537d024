"""Checkpoints that do not know how they were sharded, and never look finished before they are.

`checkpoints/step-00001000/` holds model.safetensors (fp32 weights by Hugging Face name), optimizer.safetensors
("name.exp_avg", "name.exp_avg_sq"), state.json, config.yaml, and MANIFEST.json (size and sha256 of each, written
last). It is written under a temporary name, fsynced and renamed; LATEST is replaced atomically. Nothing is pickled.

`python -m pretrain.checkpoint runs/x` lists and verifies.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import DiskError, ExitCode, UserError

_NAME = re.compile(r"step-([0-9]{8,})")
_MANIFEST = "MANIFEST.json"
_MODEL, _OPTIMIZER, _STATE, _CONFIG = "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
_FILES = (_MODEL, _OPTIMIZER, _STATE, _CONFIG)
_TEMPORARY = ".writing-"
_MAX_FAILED_SAVES = 3


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything but tensors that resuming needs. The data's state is the count of samples trained on."""

    step: int
    samples: int
    tokens: int
    optimizer_steps: int  # updates applied: fewer than `step` where steps were skipped
    loss_scale: float
    manifest_sha256: str
    tokenizer_fingerprint: str
    seed: int
    global_batch_size: int
    wandb_id: str | None


class Snapshot(NamedTuple):
    """A checkpoint in memory."""

    state: TrainingState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    config_yaml: str


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def newest_verified(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in which every checksum holds; `report` is told of each that is passed over."""
    for path in reversed(list_checkpoints(folder)):
        faults = verify(path)
        if not faults:
            return path
        report(f"checkpoint {path} is damaged ({faults[0]}); trying the one before it")
    return None


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty when it is whole."""
    try:
        listed = json.loads((path / _MANIFEST).read_bytes())["files"]
        expected = {name: (int(listed[name]["bytes"]), str(listed[name]["sha256"])) for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{_MANIFEST}: unreadable ({error})"]
    faults = []
    for name, (size, digest) in expected.items():
        try:
            if (path / name).stat().st_size != size:
                faults.append(f"{name}: not {size} bytes long")
            elif _sha256(path / name) != digest:
                faults.append(f"{name}: its checksum differs")
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def load(path: Path) -> Snapshot:
    """Read a checkpoint that was verified. Raises `UserError` where its content is not what it must be."""
    try:
        state = _parse_state(json.loads((path / _STATE).read_bytes()))
        config_yaml = (path / _CONFIG).read_text(encoding="utf-8")
        return Snapshot(state, load_file(path / _MODEL), load_file(path / _OPTIMIZER), config_yaml)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({error}); remove it to resume from the one before") from error


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint so that it appears whole or not at all. Raises OSError."""
    final = path_of(folder, snapshot.state.step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(dict(snapshot.weights), temporary / _MODEL, metadata={"format": "pt"})
        save_file(dict(snapshot.moments), temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps(asdict(snapshot.state), indent=1) + "\n", encoding="utf-8")
        (temporary / _CONFIG).write_text(snapshot.config_yaml, encoding="utf-8")
        files = {}
        for name in _FILES:
            _fsync(temporary / name)
            files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        (temporary / _MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n")
        _fsync(temporary / _MANIFEST)
        _fsync(temporary)
        if final.exists():  # a damaged one that resuming passed over
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(folder)
    pointer = folder / ".LATEST.tmp"
    pointer.write_text(final.name + "\n")
    pointer.replace(folder / "LATEST")
    return final


def retain(folder: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Remove checkpoints that the rules let go; the newest is never among them."""
    removed = []
    for path in list_checkpoints(folder)[:-keep_last]:
        if keep_every and _step_of(path) % keep_every == 0:
            continue
        doomed = path.with_name(_TEMPORARY + path.name)  # renamed first: a half-removed one must not look whole
        path.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(path)
    return removed


class Writer:
    """Writes checkpoints in a background thread, one at a time, on rank 0.

    A save that fails for want of disk space leaves the previous checkpoint, says so and lets training go on; after
    `_MAX_FAILED_SAVES` in a row, and at the end of the run, it is a `DiskError`.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures: list[str] = []

    def submit(self, snapshot: Snapshot) -> None:
        """Start writing; waits for the checkpoint before it."""
        self._join()
        if len(self._failures) >= _MAX_FAILED_SAVES:
            raise DiskError(self._failures[-1])
        self._pending = self._pool.submit(self._write, snapshot)

    def close(self) -> None:
        """Wait for the last one. Raises `DiskError` if it could not be written."""
        self._join()
        if self._failures:
            raise DiskError(self._failures[-1])

    def _join(self) -> None:
        if self._pending is not None:
            self._pending.result()  # raises what the thread raised
            self._pending = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(self._folder, snapshot)
            retain(self._folder, keep_last=self._keep_last, keep_every=self._keep_every)
            self._failures.clear()
        except (OSError, SafetensorError) as error:
            where = path_of(self._folder, snapshot.state.step)
            self._failures.append(f"{where}: not saved ({error}); free space and run the same command again")
            self._say(f"warning: {self._failures[-1]}")


def _parse_state(body: Any) -> TrainingState:
    kinds: dict[str, tuple[type, ...]] = {"loss_scale": (int, float), "wandb_id": (str, type(None))}
    texts = ("manifest_sha256", "tokenizer_fingerprint")
    values: dict[str, Any] = {}
    for field in fields(TrainingState):
        value = body[field.name]
        kind = kinds.get(field.name, (str,) if field.name in texts else (int,))
        if not isinstance(value, kind):
            raise ValueError(f"{_STATE}: {field.name} is {value!r:.50}")
        values[field.name] = value
    return TrainingState(**values)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match.group(1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.checkpoint", description="List and verify checkpoints.")
    parser.add_argument("run", type=Path, help="run directory, or its checkpoints directory")
    run = parser.parse_args().run
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    found = list_checkpoints(folder)
    if not found:
        print(f"error: {folder}: holds no checkpoints; name a run directory", file=sys.stderr)
        return ExitCode.USAGE
    damaged = 0
    for path in found:
        faults = verify(path)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{path.name}  {size / 1e6:10.1f} MB  {'; '.join(faults) or 'verified'}")
        damaged += bool(faults)
    return ExitCode.USAGE if damaged else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
