"""Feeds each parser of what comes from others with mutated inputs: `python -m tests.fuzz.fuzz [TARGET …] --seconds 60`.

A target has valid inputs, made when it starts, and reads them from a folder. Each round changes one of its files, in
bytes or in the values of its JSON, and reads again. Only `UserError`, or what the parser documents, may come out; no
file outside of the folder may be written, renamed or removed, and no process started (an audit hook looks). Whatever
else comes out is printed with the seed that makes it again: `--seed N --rounds 1`.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from cloze.corpus.manifest import NAME, read_manifest, sealed_json
from cloze.corpus.tokenizer import load_tokenizer
from cloze.corpus.verify import faults
from cloze.errors import UserError
from launch.command import read_hostfile
from pretrain import checkpoint
from pretrain.checkpoint import LossScale, Snapshot, TrainingState
from pretrain.checkpoint import format as checkpoint_format
from pretrain.data.loader import TrainingCorpus
from pretrain.model.published import read_published
from pretrain.run_directory import refuse_lost, saved_step
from pretrain.runs.listing import listed, table
from pretrain.telemetry.report import write_report
from pretrain.telemetry.wandb_sink import RunId, _Listener
from tests.support import make_corpus, make_identity

# Mutations

ODD_BYTES = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"[" * 2000, b"../", b"%s%n", b"\xed\xa0\x80"]
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, -0.5, 1e308, float("nan"), float("inf"),
    "", "a", "../../x", "/etc/passwd", "\x00", "x" * 100_000, "\ud800", [], {}, [[]], {"a": 1}, [0], ["a"], "1", "NaN",
    "<b>",
]  # fmt: skip


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four small damages."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 512))
        kind = rng.randrange(7)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = rng.choice(ODD_BYTES)
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            changed[at : at + length] = bytes(rng.randrange(256) for _ in range(length))
        else:
            number = rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
            changed[at : at + 8] = number.to_bytes(8, "little")
    return bytes(changed)


def change_value(rng: random.Random, body: Any) -> Any:
    """One value somewhere in a JSON body is another one, is gone, or has another name."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            walk(part[key])

    walk(body)
    if not places:
        return rng.choice(ODD_VALUES)
    container, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("a", "", "../x", *map(str, container)))] = container.pop(key)
    elif kind == 2 and isinstance(container[key], int):
        container[key] += rng.choice((-1, 1, 2**16, 2**32, -(2**40)))
    elif kind == 3:
        container[key] = rng.choice(places)[0]
        try:
            json.dumps(body)
        except ValueError:  # it would hold itself
            container[key] = None
    else:
        container[key] = rng.choice(ODD_VALUES)
    return body


def change_json(rng: random.Random, data: bytes) -> bytes:
    body = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        body = change_value(rng, body)
    return json.dumps(body).encode(errors="surrogatepass")


def change_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines: one of them."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = change_json(rng, lines[at]) + rng.choice((b"\n", b"\n", b"", b"\r\n"))
    return b"".join(lines)


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The JSON of its header, with its length set right, mostly."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Words swapped for odd ones."""
    words = data.decode(errors="replace").split(" ")
    words[rng.randrange(len(words))] = str(rng.choice([value for value in ODD_VALUES if value != "\ud800"]))[:200]
    return " ".join(words).encode()


CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": change_json, ".jsonl": change_lines, ".safetensors": change_safetensors, ".yaml": change_text,
    "": change_text,
}  # fmt: skip


def mutate(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    change = CHANGES.get(path.suffix, change_bytes)
    try:
        path.write_bytes((change if rng.random() < 0.7 else change_bytes)(rng, data))
    except ValueError:  # no JSON is left to change
        path.write_bytes(change_bytes(rng, data))


# Targets


@dataclass(frozen=True)
class Target:
    """`make(folder)` writes valid inputs, `read(folder)` is what is tried; `mend(folder)` makes seals fit again."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    mend: Callable[[Path], None] = lambda folder: None
    files: str = "**/*"


def make_run(folder: Path) -> None:
    rows = [
        {
            "step": step,
            "train/loss": 9 / step,
            "train/lr": 1e-3,
            "samples": 16 * step,
            "tokens": 300 * step,
            "time": 1.7e9,
        }
        | ({"eval/mlm_loss": 5.0, "eval/mlm_accuracy": 0.1, "eval/frequencies_loss": 5.5} if step % 5 == 0 else {})
        for step in range(1, 21)
    ]
    run = folder / "run"
    make_checkpoint(run / "checkpoints")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guesses = [{"text": "a [MASK] b", "word": "x", "guesses": [["x", 0.5], ["y", 0.1]]}]
    (run / "predictions.jsonl").write_text(json.dumps({"step": 5, "sentences": guesses}) + "\n")
    (run / "changes.jsonl").write_text('{"step": 5, "changed": {"optim.lr": ["1e-4", "5e-5"]}}\n')
    (run / "skipped.jsonl").write_text('{"step": 5, "first_position": 80, "end_position": 96}\n')
    (run / "status.json").write_text('{"exit_code": 75, "step": 20, "time": 1700000000.0}')
    environment = {"world_size": 2, "started": "2026-01-01T00:00:00Z", "host": "h", "overrides": ["run=r"], "gpus": []}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / ".cloze.json").write_text('{"made_by": "Cloze", "kind": "run", "saved_step": 3}')
    (run / "wandb_id").write_text("abc\n")
    config = {"run": "run", "steps": 20, "checkpoint": {"every": 5}, "model": {"name": "tiny"}, "optim": {"lr": 1e-3}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def read_run(folder: Path) -> None:
    run = folder / "run"
    table(listed(folder))
    write_report([run], folder / "report.html")
    saved_step(run)
    if checkpoint.newest_verified(run / "checkpoints", lambda _: None) is None:
        refuse_lost(run)
    RunId(run)


def make_checkpoint(folder: Path) -> None:
    weights = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(5)}
    moments = {
        f"{name}.{kind}": torch.rand(w.shape) for name, w in weights.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    state = TrainingState(
        step=3, samples=48, tokens=900, seconds=1.5, optimizer_steps=3, rollbacks=0, loss_scale=LossScale(),
        identity=make_identity(), wandb_id="abc",
    )  # fmt: skip
    checkpoint.write(folder, Snapshot(state, weights, moments, "run: r\nmodel: {name: tiny}\n"))


def read_checkpoint(folder: Path) -> None:
    for path in checkpoint.list_checkpoints(folder):
        checkpoint.verify(path)
        checkpoint.load(path)
    checkpoint.newest_verified(folder, lambda _: None)


def seal_checkpoint(folder: Path) -> None:
    """As who wrote the damage would have."""
    for path in checkpoint.list_checkpoints(folder):
        names = [name for name in checkpoint_format.FILES if (path / name).exists()]
        files = {name: ((path / name).stat().st_size, checkpoint_format.storage.sha256(path / name)) for name in names}
        (path / checkpoint_format.MANIFEST).write_text(checkpoint_format._manifest_text(files))


def make_small_corpus(folder: Path) -> None:
    make_corpus(folder / "c", samples=24, val=6, samples_per_block=8, max_len=12)


def read_corpus(folder: Path) -> None:
    directory = folder / "c"
    manifest = read_manifest(directory)
    list(faults(directory))
    corpus = TrainingCorpus(directory)
    for start in range(0, min(sum(corpus.pass_sizes), 48), 8):
        corpus.training_batch(1, np.arange(start, start + 8, dtype=np.int64))
    for split, samples in corpus.held_out.items():
        if samples:
            corpus.val_batch(np.arange(min(samples, 6), dtype=np.int64), split)
    assert manifest.max_len == corpus.manifest.max_len


def seal_corpus(folder: Path) -> None:
    """Manifest and shards agree in checksums, so that what they hold is read."""
    path = folder / "c" / NAME
    try:
        body = json.loads(path.read_bytes())
        for shard in body["shards"]:
            file = folder / "c" / shard["split"] / shard["name"]
            if "/" in shard["name"] or not file.is_file():
                continue
            data, blocks = file.read_bytes(), shard["blocks"]
            shard["bytes"], shard["sha256"] = len(data), checkpoint_format.storage.sha256(file)
            spans = zip(blocks["offsets"], blocks["bytes"], strict=True)
            blocks["crc32"] = [zlib.crc32(data[start : start + size]) for start, size in spans]
        path.write_text(sealed_json(body))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError, OSError):
        return


def make_tokenizer(folder: Path) -> None:
    make_small_corpus(folder)
    shutil.move(folder / "c" / "tokenizer", folder / "tokenizer")
    shutil.rmtree(folder / "c")
    for extra in (folder / "tokenizer").iterdir():
        if extra.suffix not in (".json", ".txt"):
            extra.unlink()


def read_tokenizer(folder: Path) -> None:
    loaded = load_tokenizer(folder / "tokenizer")
    loaded.backend.encode("a word")


def make_published(folder: Path) -> None:
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=61, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForPreTraining(config)
    (folder / "m").mkdir()
    config.architectures = ["BertForPreTraining"]
    (folder / "m" / "config.json").write_text(json.dumps(config.to_dict()))
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items() if "decoder" not in name}
    save_file(weights, folder / "m" / "model.safetensors")


def read_model(folder: Path) -> None:
    read_published(str(folder / "m")).described()


def make_hostfile(folder: Path) -> None:
    (folder / "hostfile").write_text("# two\ngpu1 slots=8\ngpu2 slots=8 # the other\n")


def make_said(folder: Path) -> None:
    (folder / "said").write_text(
        "wandb: WARNING Fatal error while uploading data. Use `wandb sync` at https://a:b@c/d?token=e ."
    )


def hear(folder: Path) -> None:
    told: list[str] = []
    listener = _Listener(told.append)
    text = (folder / "said").read_bytes().decode(errors="replace")
    listener.info(text)
    listener.warning(text)
    assert all("\n" not in line for line in told), told


TARGETS = {
    "manifest": Target(make_small_corpus, read_corpus, files="c/manifest.json"),
    "sealed manifest": Target(make_small_corpus, read_corpus, seal_corpus, "c/manifest.json"),
    "sealed shards": Target(make_small_corpus, read_corpus, seal_corpus, "c/*/*.tar"),
    "tokenizer": Target(make_tokenizer, read_tokenizer),
    "checkpoint": Target(make_checkpoint, read_checkpoint),
    "sealed checkpoint": Target(make_checkpoint, read_checkpoint, seal_checkpoint, "step-*/*"),
    "published model": Target(make_published, read_model),
    "run": Target(make_run, read_run),
    "hostfile": Target(make_hostfile, lambda folder: read_hostfile(folder / "hostfile")),
    "W&B's words": Target(make_said, hear),
}


# The run


class Finding(NamedTuple):
    seed: int
    what: str
    trace: str


class _Guard:
    """Sees what this process writes, starts or removes outside of a folder."""

    WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    STARTS = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "pickle.find_class",
    )

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._look)

    def _look(self, event: str, given: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.STARTS:
            self.seen.append(f"{event} {given!r:.200}")
        elif event == "open" and isinstance(given[0], str | bytes) and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            self._inside(event, given[0])
        elif event in self.WRITES:
            for path in given[:2] if event == "os.rename" else given[:1]:
                self._inside(event, path)

    def _inside(self, event: str, path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""  # noqa: PTH100
        if name and name != os.devnull and not name.startswith(str(self.folder)):
            self.seen.append(f"{event} {name}")


GUARD = _Guard()


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    GUARD.folder, GUARD.seen = folder, []
    try:
        yield GUARD.seen
    finally:
        GUARD.folder = None


def fuzz(target: Target, folder: Path, seeds: Iterator[int], seconds: float) -> tuple[int, list[Finding]]:
    """(rounds, what should not have come out) of one target; of each kind of finding one."""
    valid = folder / "valid"
    valid.mkdir(parents=True)
    target.make(valid)
    target.read(shutil.copytree(valid, folder / "first"))  # valid inputs are read
    found: dict[str, Finding] = {}
    rounds, end = 0, time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        rounds += 1
        here = folder / "now"
        shutil.copytree(valid, here)
        rng = random.Random(seed)
        files = sorted(path for path in here.glob(target.files) if path.is_file())
        mutate(rng, rng.choice(files))
        target.mend(here)
        try:
            with watched(here) as seen, Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
                target.read(here)
        except UserError as error:
            if "\n" in str(error).strip():
                found.setdefault("two lines", Finding(seed, f"not one line: {error!r:.300}", ""))
        except BaseException as error:  # whatever it is, it should not have come out
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} {frame.filename}:{frame.lineno}"
            found.setdefault(key, Finding(seed, f"{key}: {error!s:.200}", traceback.format_exc()))
        for what in seen:
            found.setdefault(what[:40], Finding(seed, f"outside of its folder: {what}", ""))
        shutil.rmtree(here)
    shutil.rmtree(folder)
    return rounds, [*found.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all, unless some are named")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--rounds", type=int, default=2**62)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    for name in options.targets or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            seeds = iter(range(options.seed, options.seed + options.rounds))
            rounds, findings = fuzz(TARGETS[name], Path(folder).resolve() / "f", seeds, options.seconds)
        totals["rounds"] += rounds
        totals["findings"] += len(findings)
        print(f"{name}: {rounds} rounds, {len(findings)} findings", flush=True)
        for finding in findings:
            print(f"  seed {finding.seed}: {finding.what}\n{finding.trace}", flush=True)
    print(dict(totals))
    return int(totals["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
