"""Preparation killed with SIGKILL at random moments of every stage, then run again: the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.corpora import ROOT, documents, files_of, write_jsonl

KILLS = 20
STAGES = ("sample", "map", "near", "reduce")


def command(folder: Path, out: str) -> list[str]:
    return [
        sys.executable, "-m", "data_prep", "source=jsonl", f"source.paths=[{folder}/*.jsonl]", f"out={folder / out}",
        "tokenizer.vocab_size=300", "tokenizer.sample_mib=4", "max_len=64", "bucket_mib=1", "passes=2",
        "executor.workers=2", "masking=span", "clean.near_duplicates=0.8",
    ]  # fmt: skip


def stage(out: Path) -> str:
    """The latest stage that has begun."""
    begun = [name for name in STAGES if (out / ".work" / name).is_dir()]
    return begun[-1] if begun else "start"


def descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


@pytest.mark.timeout(900)
def test_twenty_kills_over_all_stages(tmp_path):
    pytest.importorskip("rensa")
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(2000, number))
    started = time.monotonic()
    subprocess.run(command(tmp_path, "whole"), cwd=ROOT, check=True, capture_output=True, timeout=200)
    seconds = time.monotonic() - started
    rng = random.Random(2018)
    kills: dict[str, int] = {}
    out, attempt = tmp_path / "killed", 0
    while sum(kills.values()) < KILLS:
        attempt += 1
        assert attempt < 4 * KILLS
        if (out / "manifest.json").exists():  # it got through between two kills: begin anew
            if (out / ".work").exists():  # the last kill fell between the manifest and clearing up
                subprocess.run(command(tmp_path, "killed"), cwd=ROOT, check=True, capture_output=True, timeout=200)
            assert files_of(out) == files_of(tmp_path / "whole")
            shutil.rmtree(out)
        args, anew, begun = command(tmp_path, "killed"), not out.exists(), time.monotonic()
        process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        moment = time.monotonic() + seconds * (rng.uniform(0.3, 0.8) if attempt % 2 else rng.uniform(0.1, 0.6))
        missed = [name for name in STAGES if name not in kills]  # some are short: chance alone would miss them
        while process.poll() is None and (time.monotonic() < moment or (missed and attempt % 4 == 0)):
            if attempt % 4 == 0 and stage(out) in missed:
                break
            time.sleep(0.005)
        if process.poll() is None:
            workers = descendants(process.pid)
            victim = rng.choice(workers) if workers and rng.random() < 0.5 else process.pid
            where = stage(out)
            os.kill(victim, signal.SIGKILL)
            kills[where] = kills.get(where, 0) + 1
        elif anew:  # the machine has become faster than it was: else no kill would find a run alive
            seconds = min(seconds, time.monotonic() - begun)
        _, stderr = process.communicate(timeout=60)
        assert b"Traceback" not in stderr, stderr.decode()
    print(f"{sum(kills.values())} kills: {kills}")
    assert kills.keys() >= set(STAGES)
    subprocess.run(command(tmp_path, "killed"), cwd=ROOT, check=True, capture_output=True, timeout=200)
    assert files_of(out) == files_of(tmp_path / "whole")
