"""What several test modules need: small corpora, and training runs as operating-system processes."""

import errno
import functools
import http.server
import json
import os
import random
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cloze import arrival
from cloze.corpus.manifest import (
    VAL,
    Manifest,
    ShardEntry,
    SplitStatistics,
    TokenizerFacts,
    pass_name,
    val_split,
    write_manifest,
)
from cloze.corpus.masking import Masking, Unmasked, draw_masks
from cloze.corpus.shards import Block, sample_ids, token_dtype, write_shard
from cloze.corpus.tokenizer import load_tokenizer, save_tokenizer
from pretrain.config import Identity

ROOT = Path(__file__).resolve().parents[1]
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)


def tokenizer_facts(vocab_size: int) -> TokenizerFacts:
    return TokenizerFacts(
        fingerprint=f"{vocab_size:064x}",
        vocab_size=vocab_size,
        pad_id=PAD,
        unk_id=UNK,
        cls_id=CLS,
        sep_id=SEP,
        mask_id=MASK,
    )


def make_tokenizer(path: Path, vocab_size: int, max_len: int) -> TokenizerFacts:
    """A WordPiece of letters, filled up with words, as data_prep saves one; specials are ids 0 … 4."""
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    fill = [f"word{i}" for i in range(vocab_size)]
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join([*SPECIALS, *letters, *fill][:vocab_size]) + "\n")
    tokenizer = load_tokenizer(path)
    save_tokenizer(tokenizer, path, max_len)
    assert tokenizer.facts.special_ids == (PAD, UNK, CLS, SEP, MASK)
    assert tokenizer.facts.vocab_size == vocab_size
    return tokenizer.facts


def random_block(
    rng: random.Random,
    *,
    samples: int,
    max_len: int,
    vocab_size: int,
    objective: str = "nsp",
    shard_id: int = 0,
    start: int = 0,
    masking: Masking | None = None,
    baked_draws: int = 0,
) -> Block:
    """Samples that can be learned: a segment counts upwards in steps of 1, 2 or 3, and a true next one counts on."""
    ordinary = vocab_size - len(SPECIALS)
    rows, lengths, labels = [], [], []
    for _ in range(samples):
        total = rng.randint(6, max_len)
        value, stride = rng.randrange(ordinary), rng.choice((1, 2, 3))
        if objective == "none":
            first, label = total, 0
        else:
            first, label = rng.randint(3, total - 2), rng.randrange(2)
        row = [CLS]
        for position in range(1, total):
            if position in (first - 1, total - 1):
                row.append(SEP)
                if label and position == first - 1:
                    value, stride = rng.randrange(ordinary), rng.choice((1, 2, 3))
            else:
                row.append(len(SPECIALS) + value)
                value = (value + stride) % ordinary
        rows += row
        lengths.append((first, total))
        labels.append(label)
    tokens_T = np.asarray(rows, dtype=token_dtype(vocab_size))
    lengths_Nx2 = np.asarray(lengths, dtype=np.uint16).reshape(-1, 2)
    word_starts_T = None
    if masking and masking.strategy != "token":
        word_starts_T = np.asarray([token < len(SPECIALS) or rng.random() < 0.6 for token in rows])
    masks = tuple(
        draw_masks(
            Unmasked(tokens_T, lengths_Nx2, sample_ids(shard_id, start, samples), word_starts_T),
            draw,
            masking or default_masking(),
            tokenizer_facts(vocab_size).mask_vocabulary,
        )
        for draw in range(baked_draws)
    )
    return Block(tokens_T, lengths_Nx2, np.asarray(labels, dtype=np.uint8), masks, word_starts_T)


def default_masking(**changes: Any) -> Masking:
    return Masking(**({"strategy": "token", "probability": 0.15, "max_predictions": 20, "seed": 7} | changes))


def make_corpus(
    path: Path,
    *,
    samples: int = 300,
    max_len: int = 24,
    vocab_size: int = 61,
    passes: int = 1,
    val: int = 37,
    baked_draws: int = 1,
    objective: str = "nsp",
    seed: int = 3,
    shards_per_split: int = 2,
    samples_per_block: int = 32,
    masking: Masking | None = None,
    named_val: Mapping[str, int] | None = None,
) -> Manifest:
    """A valid corpus of `samples` samples a pass (and `val` held out), through the product's own writers.

    `named_val` are the samples of held-out splits with names.

    Its tokenizer knows words of letters, and has `vocab_size` tokens.
    """
    facts = make_tokenizer(path / "tokenizer", vocab_size, max_len)
    rng = random.Random(seed)
    masking = masking or default_masking()
    entries: list[ShardEntry] = []
    splits: dict[str, SplitStatistics] = {}
    for split, count in [
        *((pass_name(p), samples) for p in range(passes)),
        (VAL, val),
        *((val_split(name), count) for name, count in (named_val or {}).items()),
    ]:
        if not count and split == VAL:
            continue
        (path / split).mkdir(parents=True)
        histogram = np.zeros(max_len + 1, np.int64)
        random_next = 0
        for number in range(shards_per_split):
            share = count // shards_per_split + (number < count % shards_per_split)
            shard_id = len(entries)
            starts = range(0, share, samples_per_block)
            blocks = [
                random_block(
                    rng,
                    samples=min(samples_per_block, share - start),
                    max_len=max_len,
                    vocab_size=vocab_size,
                    objective=objective,
                    shard_id=shard_id,
                    start=start,
                    masking=masking,
                    baked_draws=baked_draws,
                )
                for start in starts
            ]
            name = f"{number:06d}.tar"
            entries.append(write_shard(path / split / name, shard_id=shard_id, split=split, name=name, blocks=blocks))
            for block in blocks:
                histogram += np.bincount(block.lengths_Nx2[:, 1], minlength=max_len + 1)
                random_next += int(block.random_next_N.sum())
        mine = [entry for entry in entries if entry.split == split]
        splits[split] = SplitStatistics(
            samples=count,
            tokens=sum(entry.tokens for entry in mine),
            random_next=random_next,
            length_histogram=tuple(histogram.tolist()),
        )
    manifest = Manifest(
        tokenizer=facts,
        max_len=max_len,
        objective=objective,
        masking=masking,
        baked_draws=baked_draws,
        seed=seed,
        passes=passes,
        source={"kind": "test"},
        documents={"read": samples, "kept": samples, "dropped": {}, "bytes": 0},
        splits=splits,
        shards=tuple(entries),
    )
    write_manifest(path, manifest)
    return manifest


def make_identity(**changes: Any) -> Identity:
    values: dict[str, Any] = {
        "tokenizer": "b" * 64, "optimizer": "adamw", "data": "a" * 64, "num_samples": 300, "passes": 1, "max_len": 24,
        "seed": 1, "global_batch_size": 16, "batch_ramp": "none", "access": "mapped",
    }  # fmt: skip
    return Identity(**(values | changes))


# A web server


class Files(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, as `served` says."""

    delay_seconds: float
    ranges: bool
    fault: Callable[[str], object]
    requests: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.delay_seconds)
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range") if self.ranges else None
        self.requests.append(f"{self.path} {wanted or ''}".strip())
        fault = type(self).fault(self.requests[-1])
        if fault == "503" or not path.is_file():
            return self.send_error(503 if fault else 404)
        data, status = path.read_bytes(), 200
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            part, status = data[int(first) : int(last or len(data)) + 1], 206
            self.send_response(status)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
            data = part
        else:
            self.send_response(status)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)
        if fault == "drop":
            self.wfile.flush()
            self.connection.close()
        return None


class Hub(Files):
    """The same as the main branch of the data set org/books on a Hugging Face hub."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, _, inside = self.path.partition("?")[0].partition("/tree/main")
        folder = Path(self.directory) / inside.strip("/")
        if not self.path.startswith("/api/"):
            self.path = self.path.replace("/datasets/org/books/resolve/main", "")
            return super().do_GET()
        entries = [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": str(path.relative_to(self.directory)),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in folder.iterdir()
        ]
        body = json.dumps(entries if "/tree/" in self.path else {"id": "org/books", "sha": "0" * 40}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None


@contextmanager
def served(
    folder: Path,
    *,
    delay_seconds: float = 0.0,
    ranges: bool = True,
    fault: Callable[[str], object] = lambda what: None,
    kind: type[Files] = Files,
) -> Iterator[tuple[str, list[str]]]:
    """(URL of a web server over `folder`, what was asked of it so far: path, and byte range if any).

    `fault(what)`, of what was asked, makes the answer a "503", or "drop" the connection in the middle of its body.
    """
    requests: list[str] = []
    options = {"delay_seconds": delay_seconds, "ranges": ranges, "fault": staticmethod(fault), "requests": requests}
    handler = functools.partial(type("Handler", (kind,), options), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()


# A network file system


def lose_renames(lost: Mapping[str, str]) -> Callable[..., None]:
    """`os.replace` that loses, for targets of these names, "the answer" of what it did, or "the renaming" itself."""
    real, left = os.replace, dict(lost)

    def replace(source: Path, target: Path) -> None:
        what = left.pop(Path(target).name, None)
        if what != "the renaming":
            real(source, target)
        if what == "the answer":  # and the request, sent again, finds nothing there
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))

    return replace


# Training runs

TINY = (
    "model=tiny", "model.hidden_size=32", "model.intermediate_size=64", "model.max_positions=64", "model.dropout=0",
    "model.init=fixed", "model.position_init=normal", "model.attention_dropout=0", "precision=fp32",
    "global_batch_size=16", "micro_batch_size=4", "steps=6",
    "optim.lr=0.003", "schedule.warmup_fraction=0.2", "data.workers=0", "log.every=1", "eval.every=0",
    "checkpoint.every=0", "watchdog.seconds=100", "wandb.mode=disabled",
)  # fmt: skip
"""A run of half a second in fp32 without dropout."""


def later_wins(*words: str) -> list[str]:
    """A command line is refused that gives a key two values."""
    return arrival.later_wins(words)


GRACE_SECONDS = 30.0  # how long ranks may outlive one that failed, as under a launcher


@dataclass(frozen=True)
class Result:
    """How a training run ended."""

    codes: tuple[int, ...]  # of every rank; negative: the signal that killed it
    stderrs: tuple[str, ...]
    metrics: list[dict[str, Any]]  # metrics.jsonl
    run: Path

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def stderr(self) -> str:
        return self.stderrs[0]

    @property
    def errors(self) -> list[str]:
        """The `error:` lines of all ranks."""
        return [line for text in self.stderrs for line in text.splitlines() if line.startswith("error:")]

    def series(self, key: str) -> list[float]:
        return [line[key] for line in self.metrics if key in line]


class Job:
    """The processes of one run, each the leader of a session of its own."""

    def __init__(self, pids: Sequence[int], logs: Path, run: Path) -> None:
        self.pids, self.logs, self.run = tuple(pids), logs, run

    def codes(self) -> list[int | None]:
        paths = [self.logs / f"code-{rank}" for rank in range(len(self.pids))]
        return [int(path.read_text()) if path.exists() else None for path in paths]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def strike(self, ranks: Sequence[int], number: int, *, after: float) -> bool:
        """Signal ranks after so many seconds; False if the run was over before."""
        end = time.monotonic() + after
        while time.monotonic() < end:
            if None not in self.codes():
                return False
            time.sleep(0.005)
        for rank in ranks:
            with suppress(ProcessLookupError):
                self.signal(rank, number)
        return None in self.codes()

    def wait(self, timeout: float = 90.0) -> Result:
        """Wait for all ranks. What outlives the time-out, or a failed rank by `GRACE_SECONDS`, is killed."""
        end = time.monotonic() + timeout
        while None in (codes := self.codes()) and time.monotonic() < end:
            if any(code not in (None, 0, 75) for code in codes):
                end = min(end, time.monotonic() + GRACE_SECONDS)
                while None in self.codes() and time.monotonic() < end:
                    time.sleep(0.02)
                break
            time.sleep(0.02)
        self.kill()
        stderrs = tuple((self.logs / f"stderr-{rank}").read_text() for rank in range(len(self.pids)))
        found = tuple(code for code in self.codes() if code is not None)
        return Result(found, stderrs, read_metrics(self.run), self.run)

    def wait_for(self, step: int, timeout: float = 150.0) -> None:
        """Wait until metrics.jsonl tells of this step."""
        end = time.monotonic() + timeout
        while not any(line["step"] >= step for line in read_metrics(self.run)):
            assert time.monotonic() < end, self.logs.joinpath("stderr-0").read_text()
            assert self.codes()[0] is None, self.logs.joinpath("stderr-0").read_text()
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """The ranks that live and what they have started, loader processes above all."""
        found = []
        for pid in self.pids:
            with suppress(psutil.NoSuchProcess):
                found += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return found

    def kill(self) -> None:
        """SIGKILL to the sessions of ranks that live."""
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while None in self.codes():
            assert time.monotonic() < end, "a killed process is still there"
            time.sleep(0.01)


class Trainer:
    """Starts runs on `pretrain.train` through a fork server (fork_server.py): a rank is up in 0.1 s, not in 5."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment() | {"DS_ACCELERATOR": "cpu"},  # it is imported before it can be told by the engine
            start_new_session=True,
        )

    def start(
        self,
        *overrides: str,
        ranks: int = 1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Job:
        """Start a run. Overrides come after `TINY`; each run has a directory of its own unless `runs_root` is given.

        `before` is Python that every rank runs first, to inject a fault.
        """
        self._count += 1
        logs = self._folder / f"job-{self._count}"
        logs.mkdir()
        argv = later_wins(*TINY, f"runs_root={logs}", "run=run", *overrides)
        values = dict(argument.split("=", 1) for argument in argv if "=" in argument)
        port = free_port()
        pids = []
        for rank in range(ranks):
            request = {
                "argv": argv,
                "env": environment() | rank_environment(rank, ranks, port) | dict(env or {}),
                "cwd": str(cwd or ROOT),
                "stdout": str(logs / f"stdout-{rank}"),
                "stderr": str(logs / f"stderr-{rank}"),
                "code": str(logs / f"code-{rank}"),
                "before": before,
            }
            assert self._server.stdin
            assert self._server.stdout
            self._server.stdin.write((json.dumps(request) + "\n").encode())
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            assert answer, "the fork server is gone"
            pids.append(int(answer))
        return Job(pids, logs, Path(values["runs_root"]) / values["run"])

    def run(self, *overrides: str, ranks: int = 1, timeout: float = 90.0, **options: Any) -> Result:
        return self.start(*overrides, ranks=ranks, **options).wait(timeout)

    def close(self) -> None:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.wait(120)
        self._server.stdout.close()


def environment() -> dict[str, str]:
    """This process's environment without what a launcher sets; one thread per process, on the CPU."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WANDB_MODE", "DS_ACCELERATOR")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return kept | own


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def all_gone(processes: Sequence[psutil.Process], seconds: float = 10.0) -> bool:
    """Whether these processes end within so many seconds."""

    def lives(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    end = time.monotonic() + seconds
    while (left := [process for process in processes if lives(process)]) and time.monotonic() < end:
        time.sleep(0.02)
    return not left


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
