"""`python -m launch` over the real deepspeed and the real trainer, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ODD = "['{0..3}','$(id)','%n','it s','日本']"  # as tags, since a list of strings is what they are
TINY = (
    "model=tiny", "model.hidden_size=32", "model.intermediate_size=32", "precision=fp32", "global_batch_size=8",
    "micro_batch_size=4", "steps=3", "log.every=1", "eval.every=0", "checkpoint.every=0", "data.workers=0",
    "wandb.mode=disabled",
)  # fmt: skip


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "launch", "procs=2", f"runs_root={folder}", "run=a b", *TINY, *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_trains_on_two_processes_and_tells_errors_once(corpus: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, f"data.path={corpus}", f"wandb.tags={ODD}")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "a b"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    config = (run / "config.yaml").read_text()
    for tag in ("{0..3}", "$(id)", "%n", "it s", "日本"):
        assert tag in config
    absent = launch(tmp_path, f"data.path={tmp_path / 'absent'}")
    assert absent.returncode == 64
    assert [line for line in absent.stderr.splitlines() if line.startswith("error:")] == [
        f"error: {tmp_path / 'absent'}/manifest.json: not there; name a directory that `python -m data_prep` finished"
    ]
