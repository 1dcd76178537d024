"""`launch slurm` and srun on a real Slurm of two nodes: what `scontrol show job` tells, losses, leftovers."""

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.slurm import seconds_of
from tests.cluster import slurm as real
from tests.cluster.cluster import NODES, Cluster, why_not
from tests.cluster.slurm import Slurm
from tests.support import ROOT, TINY, Trainer, later_wins, read_metrics
from tests.unit.corpora import documents, files_of, write_jsonl


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := real.why_not() or why_not():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("named"), named=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    return Slurm(cluster, tmp_path_factory.mktemp("slurm"))


def left(cluster: Cluster) -> list[list[str]]:
    """What still runs of training on either node."""
    found = [process.cmdline() for node in NODES for process in cluster.processes(node)]
    return [words for words in found if any(word.startswith("data.path=") for word in words)]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_stop_and_runs_out_of_time(
    cluster: Cluster, slurm: Slurm, trainer: Trainer, corpus: Path, tmp_path: Path
) -> None:
    """Twice it asks to be queued again, and goes on where it was; then it trains on while a node of it is drained."""
    run = tmp_path / "run"
    own = (f"data.path={corpus}", f"runs_root={tmp_path}", "run=run", "wandb.tags=['$(id) *']")
    words = later_wins(*TINY, "steps=1000000", "checkpoint.every=1000", *own)
    command = [sys.executable, "-m", "launch", "slurm", "nodes=2", "gpus_per_node=1", "time=10", *words]
    submitted = cluster.start(command, tmp_path / "submitted", slurm.environment | {"DS_ACCELERATOR": "cpu"})
    assert submitted.wait(200) == 0, (tmp_path / "submitted").read_text()
    job = (tmp_path / "submitted").read_text().split()[-1]

    def trained_until(step: int) -> None:
        def is_so() -> bool:
            assert slurm.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log(run)
            return any(line["step"] >= step for line in read_metrics(run))

        slurm.wait_until(is_so)

    def queued_again(restarts: int) -> int:
        """Wait for it, and have it start at once; the step at which it stopped."""
        slurm.wait_until(lambda: slurm.job(job)["Restarts"] == str(restarts))
        slurm.wait_until(lambda: not left(cluster))
        status = json.loads((run / "status.json").read_text())
        assert status["exit_code"] == 75, log(run)
        # Else in two minutes; and not in the second of its end: slurmd takes it for the job that was ended then.
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+5", "TimeLimit=10")
        return int(status["step"])

    trained_until(10)
    known = slurm.job(job)
    assert (known["JobState"], known["NodeList"], known["Restarts"]) == ("RUNNING", "node[1-2]", "0")
    slurm.run("scancel", "--signal=USR1", job)
    first = queued_again(1)
    trained_until(first + 50)
    minutes = seconds_of(slurm.job(job)["RunTime"]) // 60 + 2  # 1 to 2 from now: those 120 s before the end have begun
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    second = queued_again(2)
    slurm.wait_until(lambda: slurm.job(job)["JobState"] == "RUNNING")
    slurm.run("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    trained_until(second + 10)
    assert "DRAIN" in slurm.run("scontrol", "show", "node", "node2")
    slurm.run("scancel", job)
    slurm.wait_until(lambda: slurm.job(job)["JobState"] == "CANCELLED")
    slurm.wait_until(lambda: not left(cluster))
    slurm.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert "$(id) *" in (run / "config.yaml").read_text()
    expected = trainer.run(f"data.path={corpus}", "steps=1000000", f"stop_at={first + 50}", ranks=2, timeout=250)
    steps = range(1, first + 51)
    assert [losses(run)[step] for step in steps] == pytest.approx(expected.series("train/loss"), rel=1e-4)


def log(run: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in run.glob("slurm-*.log"))


def test_srun_alone_and_a_script_that_forgets_it(
    cluster: Cluster, slurm: Slurm, trainer: Trainer, corpus: Path, tmp_path: Path
) -> None:
    expected = trainer.run(f"data.path={corpus}", "steps=5", ranks=2)
    words = later_wins(*TINY, "steps=5", f"data.path={corpus}", f"runs_root={tmp_path}")
    command = [sys.executable, "-m", "pretrain.train", *words]
    both = cluster.start(
        ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit", *command, "run=srun"],
        tmp_path / "srun.log",
        slurm.environment | {"DS_ACCELERATOR": "cpu"},
    )
    assert both.wait(200) == 0, (tmp_path / "srun.log").read_text()
    assert json.loads((tmp_path / "srun" / "environment.json").read_text())["world_size"] == 2
    assert list(losses(tmp_path / "srun").values()) == pytest.approx(expected.series("train/loss"), rel=1e-6)
    script = tmp_path / "script"
    script.write_text(f"#!/bin/bash\ncd {ROOT}\n" + " ".join(f"'{word}'" for word in [*command, "run=alone"]) + "\n")
    alone = cluster.start(
        ["sbatch", "--wait", "--ntasks=2", f"--output={tmp_path}/alone.log", str(script)],
        tmp_path / "sbatch.log",
        slurm.environment | {"DS_ACCELERATOR": "cpu"},
    )
    assert alone.wait(200) == 0, (tmp_path / "alone.log").read_text()
    told = (tmp_path / "alone.log").read_text()
    assert told.startswith("warning: SLURM_NTASKS=2 is not for this process: it trains alone; for several ranks start")
    assert json.loads((tmp_path / "alone" / "environment.json").read_text())["world_size"] == 1


@pytest.mark.timeout(900)
def test_a_preparation_as_an_array_with_a_task_that_is_killed(cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    """Six calls share the work; one is killed and queued again while the others wait for it: the bytes of one call."""
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(2100, number))  # above 1 MiB: a task each
    own = ["source=jsonl", f"source.paths=[{tmp_path}/*.jsonl]", "tokenizer.vocab_size=200", "max_len=64"]
    prepare = [sys.executable, "-m", "data_prep", *own, "bucket_mib=1", "tokenizer.sample_mib=1", "executor.workers=1"]
    whole = cluster.start([*prepare, f"out={tmp_path / 'whole'}"], tmp_path / "whole.log")
    out = tmp_path / "array"
    wrapped = shlex.join([*prepare, f"out={out}", "executor=array"])
    options = ("--parsable", "--hold", "--array=0-5", f"--chdir={ROOT}", f"--output={tmp_path}/%a.log")
    job = slurm.run("sbatch", *options, f"--wrap={wrapped}").strip()
    tasks = [f"{job}_{number}" for number in range(6)]

    def states() -> set[str]:
        return {slurm.job(task)["JobState"] for task in tasks}

    def call(number: int) -> list[psutil.Process]:
        found = []
        for process in (process for node in NODES for process in cluster.processes(node)):
            with suppress(psutil.Error):
                if "data_prep" in process.cmdline() and process.environ().get("SLURM_ARRAY_TASK_ID") == str(number):
                    found.append(process)
        return found

    slurm.run("scontrol", "release", tasks[3])  # it cannot finish alone, so it is there to be killed
    slurm.wait_until(lambda: call(3) != [])
    for process in call(3):
        process.send_signal(signal.SIGSTOP)
    for task in (*tasks[:3], *tasks[4:]):
        slurm.run("scontrol", "release", task)
    slurm.wait_until(lambda: len(list(out.glob(".work/sample/*"))) == 5)  # the shares of the others
    slurm.wait_until(lambda: states() == {"RUNNING"})
    slurm.run("scontrol", "requeue", tasks[3])
    slurm.wait_until(lambda: (slurm.job(tasks[3])["JobState"], slurm.job(tasks[3])["Restarts"]) == ("PENDING", "1"))
    slurm.wait_until(lambda: call(3) == [])
    slurm.run("scontrol", "update", f"JobId={tasks[3]}", "StartTime=now+5")  # else in two minutes
    slurm.wait_until(lambda: states() == {"COMPLETED"}, seconds=400)
    told = {task: (slurm.job(task)["Restarts"], slurm.job(task)["ExitCode"]) for task in tasks}
    assert told == {task: ("1" if task == tasks[3] else "0", "0:0") for task in tasks}
    assert whole.wait(200) == 0, (tmp_path / "whole.log").read_text()
    assert files_of(out) == files_of(tmp_path / "whole")
