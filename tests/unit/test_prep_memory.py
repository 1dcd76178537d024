"""Memory is bounded: by the size of a bucket whatever the corpus, and by a few lines whatever a file decompresses to.

Peak resident memory of a process of its own, as the kernel counts it; or what is allocated, by tracemalloc.
"""

import bz2
import io
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

from cloze.cli import compose
from data_prep.config import PrepConfig
from data_prep.plan import claimed, make_plan
from data_prep.stages.buckets import BucketWriter, Documents, documents_table, read_bucket
from data_prep.stages.reduce import _distinct
from data_prep.stages.sample import SAMPLE, sampled_pieces
from tests.unit.corpora import ROOT, WORDS, vocabulary

MB = 1e6
TABLE = documents_table(np.uint16)


PROGRAM = """
import atexit, pathlib, re, runpy, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]))
runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
"""


def peak_mb(*overrides: str, code: int = 0) -> float:
    """Run a preparation with one worker, which is the process itself; the most memory it ever held."""
    command = [sys.executable, "-c", PROGRAM, *overrides, "executor.workers=1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == code, run.stderr
    return int(run.stdout.split()[-1]) / 1e3


def text_file(path: Path, megabytes: int) -> Path:
    """Distinct documents of some kilobytes."""
    rng = random.Random(megabytes)
    with path.open("w") as file:
        while file.tell() < megabytes * MB:
            words = rng.choices(WORDS, k=700)
            words[::10] = [f"{word.capitalize()} {rng.randrange(10**6)}." for word in words[::10]]
            file.write(" ".join(words) + "\n\n")
    return path


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_corpus_of_twelve_times_the_size_takes_no_more(tmp_path):
    vocabulary(tmp_path / "vocab.txt")
    peaks = []
    for megabytes in (3, 36):
        path = text_file(tmp_path / f"{megabytes}.txt", megabytes)
        peaks.append(
            peak_mb(
                "source=text", f"source.paths=[{path}]", f"out={tmp_path / path.stem}", "bucket_mib=2",
                f"tokenizer.path={tmp_path}/vocab.txt",
            )
        )  # fmt: skip
    assert peaks[1] < peaks[0] + 15
    assert peaks[1] < 150


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_count_in_the_size_of_buckets(tmp_path):
    vocabulary(tmp_path / "vocab.txt")
    path = text_file(tmp_path / "3.txt", 3)
    peaks = [
        peak_mb(
            f"sources=[{{kind: text, paths: [{path}], weight: {weight}}}]", f"out={tmp_path / str(weight)}",
            "bucket_mib=2", f"tokenizer.path={tmp_path}/vocab.txt",
        )
        for weight in (1, 40)
    ]  # fmt: skip
    assert peaks[1] < peaks[0] + 15


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".bz2", ".zst"])
def test_a_bomb_takes_a_few_lines_of_memory(tmp_path, suffix):
    """A quarter of a gigabyte in some kilobytes, on one line."""
    bomb = b'{"text": "' + bytes(2**28).replace(b"\0", b"a") + b'"}\n'
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(bz2.compress(bomb) if suffix == ".bz2" else zstandard.compress(bomb))
    assert path.stat().st_size < 20_000
    vocabulary(tmp_path / "vocab.txt")
    peak = peak_mb(
        "source=jsonl", f"source.paths=[{path}]", f"out={tmp_path}/out", f"tokenizer.path={tmp_path}/vocab.txt", code=64
    )
    assert peak < 400


def million_tokens(seed: int) -> Documents:
    """A thousand documents of ten sentences of a hundred tokens."""
    rng = np.random.default_rng(seed)
    return Documents(
        rng.integers(0, 2**63, (1000, 2), np.uint64),
        np.arange(1000, dtype=np.uint64),
        np.zeros(1000, np.uint16),
        np.full(1000, 10, np.uint32),
        np.full(10_000, 100, np.uint16),
        rng.integers(0, 2**16, 10**6, np.uint16),
        np.zeros(0, bool),
    )


def test_a_map_task_holds_a_few_million_tokens(tmp_path):
    """Sixty million go in; every one comes out of its bucket."""
    path = tmp_path / "x"
    tracemalloc.start()
    with path.open("wb") as file:
        writer = BucketWriter(file, TABLE, 7)
        for number in range(60):
            writer.add(million_tokens(number), np.arange(1000) % 7)
        writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * MB
    found = sum(int(part.tokens_T.sum()) for bucket in range(7) for part in read_bucket(TABLE, [path], bucket, 7))
    assert found == sum(int(million_tokens(number).tokens_T.sum()) for number in range(60))


def test_the_tokenizer_learns_from_a_bounded_sample(tmp_path):
    text_file(tmp_path / "a.txt", 5)
    overrides = ["source=text", f"source.paths=[{tmp_path}/a.txt]", f"out={tmp_path}/out", "tokenizer.sample_mib=1"]
    plan = make_plan(compose("prep", PrepConfig, overrides))
    assert len(plan.tasks) == 3
    with claimed(plan):
        sizes = []
        for number in range(SAMPLE.num_tasks(plan)):
            SAMPLE.run_task(plan, number)
            words = sampled_pieces(plan, number)
            sizes.append(sum((len(word) + 1) * count for word, count in words.items()))
    assert all(size > 0 for size in sizes)
    assert 0.8 * 2**20 < sum(sizes) < 1.1 * 2**20


def test_duplicates_are_not_held(tmp_path):
    """A bucket in which one text stands a thousand times takes the memory of one."""
    one = million_tokens(0)
    file = io.BytesIO()
    writer = BucketWriter(file, TABLE, 1)
    for _ in range(40):
        writer.add(one, np.zeros(1000, np.int64))
    writer.finish()
    (tmp_path / "x").write_bytes(file.getvalue())
    del file, writer
    tracemalloc.start()
    documents, again = _distinct(TABLE, read_bucket(TABLE, [tmp_path / "x"], 0, 1), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(documents.digests_Dx2), again) == (1000, [39_000])
    assert peak < 40 * MB
