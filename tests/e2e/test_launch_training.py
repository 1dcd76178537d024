"""`python -m launch` over the real deepspeed and the real trainer, as a user starts it."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from pretrain import checkpoint
from tests.support import ROOT, later_wins, read_metrics

ODD = "['{0..3}','$(id)','%n','it s','日本']"  # as tags, since a list of strings is what they are
TINY = (
    "model=tiny", "model.hidden_size=32", "model.intermediate_size=32", "precision=fp32", "global_batch_size=8",
    "micro_batch_size=4", "steps=3", "log.every=1", "eval.every=0", "checkpoint.every=0", "data.workers=0",
    "wandb.mode=disabled",
)  # fmt: skip


def launch(folder: Path, *overrides: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **(more or {})}
    command = [
        sys.executable,
        "-m",
        "launch",
        *later_wins("procs=2", f"runs_root={folder}", "run=a b", *TINY, *overrides),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_terminal_that_is_closed_costs_no_progress(corpus: Path, tmp_path: Path) -> None:
    """The shell and the kernel both send SIGHUP, and writing to the terminal fails from then on."""
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "run=r", "steps=1000000")
    command = [sys.executable, "-m", "launch", "procs=1", *later_wins(*TINY, *overrides)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, also where the tests run under nohup
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.execvp("bash", ["bash", "--norc", "-i"])
    os.write(terminal, (shlex.join(command) + f"; echo $? > {tmp_path}/code\n").encode())
    run = tmp_path / "r"
    wait_until(lambda: bool(shown(terminal) and read_metrics(run)))
    os.close(terminal)
    wait_until((run / "status.json").exists)
    os.waitpid(pid, 0)
    status = json.loads((run / "status.json").read_text())
    assert status["exit_code"] == 75
    (saved,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.verify(saved) == []
    assert checkpoint.step_of(saved) == status["step"]
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])])


def shown(terminal: int) -> bool:
    """Read what is there: a terminal that nobody reads stops those who write."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 1 << 12)
    return True


def wait_until(is_so: Callable[[], bool], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


SLOW_SINK = """
import os, time
class Slow:
    def __init__(self, run_dir, resume_step, resolved): pass
    def log(self, step, metrics): pass
    def rollback(self, step): pass
    def close(self, exit_code): time.sleep(float(os.environ["SLOW"]))
"""


@pytest.mark.slow
def test_rank_0_may_take_its_time_to_close_its_trackers(corpus: Path, tmp_path: Path) -> None:
    """Longer than DeepSpeed's launcher leaves to a rank whose peer has left with a code."""
    (tmp_path / "slow_sink_of_a_test.py").write_text(SLOW_SINK)
    more = {"SLOW": "40", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = launch(
        tmp_path, f"data.path={corpus}", "log.sinks=[slow_sink_of_a_test:Slow]", "stop_at=2", "restarts=1", more=more
    )
    assert done.returncode == 75, done.stderr
    assert "restart" not in done.stderr
    assert json.loads((tmp_path / "a b" / "status.json").read_text())["exit_code"] == 75


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks+=($!); done
until [ -s "$RUN/metrics.jsonl" ]; do sleep 0.1; done
kill -"$NUMBER" "${tasks[0]}" # USR1: the time is nearly up
most=0
for task in "${tasks[@]}"; do
  wait -n "${tasks[@]}"; code=$?
  if [ "$code" -gt "$most" ]; then most=$code; fi
  if [ "$code" != 0 ]; then kill -KILL "${tasks[@]}" 2>/dev/null; fi # --kill-on-bad-exit
done
exit "$most"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("USR1", -15), ("KILL", 137)])
def test_a_slurm_script_trains_and_asks_to_be_queued_again(
    corpus: Path, tmp_path: Path, number: str, code: int
) -> None:
    """The script itself, over a stub of srun that does what Slurm does for two nodes of one task."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\nkill $PPID\n')
    (tools / "sbatch").write_text(f'#!/bin/bash\ncp "$1" {tmp_path}/submitted\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    run = tmp_path / "slurmed"
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7", "RUN": str(run), "NUMBER": number,
    }  # fmt: skip
    own = (f"runs_root={tmp_path}", "run=slurmed", "steps=100000", f"wandb.tags={ODD}")
    overrides = later_wins(f"data.path={corpus}", *TINY, *own)
    command = [sys.executable, "-m", "launch", "slurm", "nodes=2", "gpus_per_node=1", "time=10", *overrides]
    subprocess.run(command, check=True, env=environment)
    done = subprocess.run(
        ["bash", str(tmp_path / "submitted")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert "日本" in (run / "config.yaml").read_text()
    assert (tmp_path / "scontrol").exists() == (number == "USR1")
    if number == "USR1":  # and Slurm has ended the script
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
        assert json.loads((run / "status.json").read_text())["step"] >= 1
