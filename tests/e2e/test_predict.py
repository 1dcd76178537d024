"""Labelling a file with processes that are killed (SIGKILL), wherever that finds them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from tests.support import environment
from tests.unit.tiny_bert import WORDS, write_tiny_bert


@pytest.mark.slow
def test_killed_processes_leave_what_one_undisturbed_process_writes(tmp_path: Path) -> None:
    write_tiny_bert(tmp_path / "model")
    shape = BertConfig.from_pretrained(tmp_path / "model", num_labels=2, initializer_range=0.5)
    BertForSequenceClassification(shape).save_pretrained(tmp_path / "model")
    count = 60_000
    lines = [" ".join(WORDS[(i * k) % 16] for k in range(1, 3 + i % 9)) for i in range(count)]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "finetune.predict", "model", "in.txt", out]
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)

    assert start("whole.jsonl").wait(timeout=200) == 0
    mark, seen = tmp_path / "out.jsonl.part.json", 0
    for _ in range(3):  # each is killed some time after it has come further than the one before
        with start("out.jsonl") as child:
            while child.poll() is None and (not mark.exists() or json.loads(mark.read_text())["rows"] <= seen):
                time.sleep(0.02)
            child.kill()
        assert child.returncode == -9, "it ended too soon to be killed: more lines are needed"
        assert not (tmp_path / "out.jsonl").exists()
        seen = json.loads(mark.read_text())["rows"]
    assert 0 < seen < count
    assert start("out.jsonl").wait(timeout=200) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not mark.exists()
