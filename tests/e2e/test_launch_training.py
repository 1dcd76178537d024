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


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!); done
until [ -s "$RUN/metrics.jsonl" ]; do sleep 0.1; done
kill -USR1 "${tasks[@]}" # the time is nearly up
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""


def test_a_slurm_script_trains_and_asks_to_be_queued_again(corpus: Path, tmp_path: Path) -> None:
    """The script itself, over a stub of srun that sets what Slurm sets for two nodes of one task."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\n')
    (tools / "sbatch").write_text(f'#!/bin/bash\ncp "$1" {tmp_path}/submitted\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}
    run = tmp_path / "slurmed"
    environment["RUN"] = str(run)
    own = (f"runs_root={tmp_path}", "run=slurmed", "steps=100000", f"wandb.tags={ODD}")
    overrides = (f"data.path={corpus}", *TINY, *own)
    command = [sys.executable, "-m", "launch", "slurm", "nodes=2", "gpus_per_node=1", "time=10", *overrides]
    subprocess.run(command, check=True, env=environment)
    done = subprocess.run(
        ["bash", str(tmp_path / "submitted")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "status.json").read_text())["step"] >= 1
    assert "日本" in (run / "config.yaml").read_text()
