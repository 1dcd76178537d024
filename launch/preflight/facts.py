"""What `launch check` asks a host: `python -m launch.preflight.facts` answers training's overrides with facts in JSON.

Imports no torch: a wrong one is among the things to find.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloze import cli, storage
from cloze.corpus.manifest import NAME as MANIFEST_NAME
from cloze.corpus.manifest import Manifest, is_held_out, read_manifest
from cloze.errors import UserError
from pretrain.agreement import source_hash, versions
from pretrain.config import Access, TrainConfig
from pretrain.machine import machine_id
from pretrain.phases import phases_of

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "webdataset", "hydra-core", "numpy")
_SOURCES = ("cloze", "data_prep", "pretrain", "launch", "conf")
_GPU_FIELDS = ("name", "memory.used", "ecc.errors.uncorrected.volatile.total")  # memory in MiB


def facts(overrides: Sequence[str]) -> dict[str, Any]:
    """What must be equal on all hosts, and what must be good on each. Raises `UserError` for a bad configuration."""
    config = cli.compose("train", TrainConfig, overrides)
    paths = _corpora(config)
    told = [path if storage.is_remote(path) else _told(_manifest(path)) for path in paths]
    here = [_manifest(path) for path in paths if not storage.is_remote(path)]
    missing = next((str(manifest) for manifest in here if not manifest.exists()), None)
    corpora = [read_manifest(manifest.parent) for manifest in here] if not missing else []
    return {
        "equal": {
            **versions(_PACKAGES),
            "code": source_hash(_SOURCES),
            "configuration": _short(repr(config).encode()),
            "data": ", ".join(told),
        },
        "data_missing": missing,
        "disks": _disks(config, corpora),
        "gpus": _gpus(),
        "machine": machine_id(),
        "time": time.time(),  # the last, for it is compared with when it arrives
    }


def _corpora(config: TrainConfig) -> list[str]:
    """The paths of all corpora of the run, each once."""
    every = [part.path for phase in phases_of(config) for part in phase.config.data.parts]
    return list(dict.fromkeys(every))


def _manifest(path: str) -> Path:
    return storage.local_path(path) / MANIFEST_NAME


def _told(manifest: Path) -> str:
    return _short(manifest.read_bytes()) if manifest.exists() else "missing"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _disks(config: TrainConfig, corpora: Sequence[Manifest]) -> dict[str, tuple[int, int]]:
    """(bytes free, bytes needed) by the key that names the directory."""
    model, vocabulary = config.model, corpora[0].tokenizer.vocab_size if corpora else 30_522
    products = 3 if model.architecture.is_gated else 2  # of the feed-forward part
    layer = model.hidden_size * (4 * model.hidden_size + products * model.intermediate_size)
    parameters = (vocabulary + model.max_positions) * model.hidden_size + model.num_layers * layer
    checkpoints = 12 * parameters * (config.checkpoint.keep_last + 2)  # one in the making, and its shares
    needed = {"runs_root": (config.runs_root, checkpoints)}
    if config.data.cache_dir and corpora:
        streamed = config.data.access is Access.stream
        shards = (shard for corpus in corpora for shard in corpus.shards)
        copied = [shard for shard in shards if is_held_out(shard.split) or not streamed]
        needed["data.cache_dir"] = (config.data.cache_dir, sum(shard.bytes for shard in copied))
    return {
        key: (shutil.disk_usage(_existing(storage.local_path(path))).free, size) for key, (path, size) in needed.items()
    }


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _gpus() -> list[dict[str, str]]:
    """`_GPU_FIELDS` of each GPU, as nvidia-smi tells them, or its "error"; none where there is no nvidia-smi."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    query = ("nvidia-smi", "--format=csv,noheader,nounits", f"--query-gpu={','.join(_GPU_FIELDS)}")
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        return [{"error": ((done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"])[0]}]
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


if __name__ == "__main__":
    try:
        found = facts(json.loads(sys.stdin.readline()))
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)
