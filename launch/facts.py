"""What `launch check` asks a host: `python -m launch.facts` answers training's overrides with facts, in JSON lines.

Imports no torch: a wrong one is among the things to find.
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
from data_prep.errors import UserError
from data_prep.manifest import NAME as MANIFEST_NAME
from pretrain.config import TrainConfig

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "webdataset", "hydra-core", "numpy")
_SOURCES = ("data_prep", "pretrain", "launch", "conf")
_GPU_FIELDS = ("name", "memory.used", "ecc.errors.uncorrected.volatile.total")  # memory in MiB


def facts(overrides: Sequence[str]) -> dict[str, Any]:
    """What must be equal on all hosts, and what must be good on each. Raises `UserError` for a bad configuration."""
    config = entry.compose("train", TrainConfig, overrides)
    manifest = Path(config.data.path) / MANIFEST_NAME
    remote = "://" in config.data.path
    return {
        "equal": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
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
    parts = []
    for package in _SOURCES:
        root = Path(__file__).resolve().parents[1] / package
        files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml"))
        parts += [f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes() for path in files]
    return _short(b"".join(parts))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _gpus() -> list[dict[str, str]]:
    """`_GPU_FIELDS` of each GPU, as nvidia-smi tells them; none where there is no nvidia-smi."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    query = ("nvidia-smi", "--format=csv,noheader,nounits", f"--query-gpu={','.join(_GPU_FIELDS)}")
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


if __name__ == "__main__":
    try:
        found = facts(json.loads(sys.stdin.readline()))
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
