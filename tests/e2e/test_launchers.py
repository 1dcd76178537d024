"""Ranks on this machine by launchers that people have besides deepspeed; tests/cluster has them on two."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, TINY, Trainer, environment, free_port, later_wins, read_metrics

PYTHON, TRAIN = sys.executable, "pretrain/train.py"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "accelerate"])
def test_two_ranks(trainer: Trainer, corpus: Path, tmp_path: Path, launcher: str) -> None:
    if launcher == "mpirun":
        if not shutil.which("mpirun"):
            pytest.skip("needs mpirun (Debian: openmpi-bin)")
        start = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", PYTHON]
    else:
        pytest.importorskip("accelerate")
        port = f"--main_process_port={free_port()}"
        options = ["--multi_gpu", "--num_machines=1", "--num_processes=2", "--mixed_precision=no", port]
        start = [PYTHON, "-m", "accelerate.commands.launch", *options, "--dynamo_backend=no"]
    expected = trainer.run(f"data.path={corpus}", "steps=5", ranks=2)
    words = later_wins(*TINY, "steps=5", f"data.path={corpus}", f"runs_root={tmp_path}", "run=r")
    done = subprocess.run(
        [*start, TRAIN, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "environment.json").read_text())["world_size"] == 2
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "r") if "train/loss" in line]
    assert losses == pytest.approx(expected.series("train/loss"), rel=1e-6)
    assert "trains alone" not in done.stderr


def test_what_an_interactive_shell_has_left_is_told(trainer: Trainer, corpus: Path) -> None:
    """One process trains, and says why it is one."""
    left = {
        "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMI_SIZE": "4",
    }  # fmt: skip
    set_by_tests = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = f"import os; [os.environ.pop(name) for name in {set_by_tests}]"
    result = trainer.run(f"data.path={corpus}", "steps=2", env=left, before=before)
    assert result.code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1, result.stderr
    assert "OMPI_COMM_WORLD_SIZE=4 is not for this process: it trains alone" in warnings[0]
    assert len(result.series("train/loss")) == 2
