"""All executors make the same bytes, also when processes die and calls come twice."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe

import psutil
import pytest

from cloze.cli import compose
from cloze.errors import ExitCode, UserError
from data_prep.config import PrepConfig
from data_prep.executors import local
from tests.unit.corpora import ROOT, documents, files_of, prep, vocabulary, write_jsonl


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A corpus of five map tasks, and what the local executor makes of it."""
    folder = tmp_path_factory.mktemp("executors")
    for number in range(5):
        path = write_jsonl(folder / f"{number}.jsonl", documents(2100, number))
        assert path.stat().st_size > 2**20
    vocabulary(folder / "vocab.txt")
    run = prep(*overrides(folder, "local"), "executor.workers=1")
    assert run.returncode == 0, run.stderr
    return folder


def overrides(folder, out):
    return [
        "source=jsonl", f"source.paths=[{folder}/*.jsonl]", f"out={folder / out}", "max_len=64", "bucket_mib=1",
        "tokenizer.vocab_size=200", "tokenizer.sample_mib=1", "val_fraction=0.1",
    ]  # fmt: skip


def start(folder, out, *extra, env=None):
    command = [sys.executable, "-m", "data_prep", *overrides(folder, out), *extra]
    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def same(folder, out):
    return files_of(folder / out) == files_of(folder / "local")


@pytest.mark.slow
def test_an_array_of_three_calls(work):
    """Numbers from Slurm's variables; two calls are started twice by mistake, the leading one too: no harm."""
    calls = [
        start(work, "array", "executor=array", "executor.wait_seconds=100",
              env={"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "3"})
        for index in (0, 0, 1, 2, 2)
    ]  # fmt: skip
    for call in calls:
        _, stderr = call.communicate(timeout=120)
        assert call.returncode == 0, stderr
    assert same(work, "array")


@pytest.mark.slow
def test_a_finishing_call_does_what_is_missing(work):
    share = ("executor=array", "executor.task_index=0", "executor.num_tasks=2", "executor.wait_seconds=0")
    call = start(work, "finished", *share)
    _, stderr = call.communicate(timeout=60)
    assert call.returncode == ExitCode.STOPPED, stderr
    assert "finish with executor=local" in stderr
    assert "Traceback" not in stderr
    assert prep(*overrides(work, "finished"), "executor.workers=2").returncode == 0
    assert same(work, "finished")


@pytest.mark.slow
def test_killed_calls_of_an_array_go_on(work):
    """SIGKILL of a call, then of the leading one, which waits for it; then both once more."""

    def call(index):
        return start(work, "killed", "executor=array", f"executor.task_index={index}", "executor.num_tasks=2")

    calls = [call(0), call(1)]
    made = work / "killed" / ".work" / "map"
    end = time.monotonic() + 60
    for victim in (1, 0):
        while not any(made.glob(f"*[{victim}{victim + 2}{victim + 4}]")) and time.monotonic() < end:
            time.sleep(0.01)
        calls[victim].kill()
        calls[victim].communicate(timeout=60)
        assert calls[victim].returncode == -signal.SIGKILL
    assert not (work / "killed" / "manifest.json").exists()
    for again in [call(0), call(1)]:
        _, stderr = again.communicate(timeout=120)
        assert again.returncode == 0, stderr
    assert same(work, "killed")


def test_array_numbers_are_checked():
    for extra in ((), ("executor.task_index=2", "executor.num_tasks=2"), ("executor.task_index=0",)):
        with pytest.raises(UserError, match=r"executor\.task_index"):
            compose("prep", PrepConfig, ["out=x", "executor=array", *extra])


def test_numbers_of_another_executor_are_refused():
    """Else every call of an array would do everything."""
    for given, kind in (("task_index=0", "local"), ("num_tasks=4", "ray"), ("address=head:6379", "local")):
        key = given.partition("=")[0]
        with pytest.raises(UserError, match=rf"^executor\.{key}: of no use to executor={kind}, whose keys are kind, w"):
            compose("prep", PrepConfig, ["out=x", "source=docstrings", f"executor={kind}", f"executor.{given}"])


def test_the_old_name_is_refused_with_the_new():
    for given in ("engine=array", "engine.workers=2"):
        with pytest.raises(
            UserError, match=rf"^{given}: is called executor now; write {given.replace('engine', 'executor')}$"
        ):
            compose("prep", PrepConfig, ["out=x", given])


@pytest.mark.slow
def test_ray_with_a_worker_killed(work):
    pytest.importorskip("ray")
    call = start(work, "ray", "executor=ray", "executor.workers=2", env={"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
    killed, end = 0, time.monotonic() + 120
    while call.poll() is None and time.monotonic() < end:
        for process in psutil.Process(call.pid).children(recursive=True) if not killed else ():
            try:
                if "ray::_ray_task" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    break
            except psutil.Error:
                continue
        time.sleep(0.02)
    _, stderr = call.communicate(timeout=60)
    assert call.returncode == 0, stderr
    assert killed
    assert same(work, "ray")


def test_a_worker_whose_parent_is_gone_ends_without_a_word(monkeypatch):
    """Its answer unread in the pipe, the kernel says "reset" where it else says "end"."""
    for name in ("TOKENIZERS_PARALLELISM", "USE_TORCH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for answer in (None, "unread"):
        theirs, ours = Pipe()
        if answer:
            theirs.send(answer)
        ours.close()
        local._work(None, theirs)
    theirs, ours = Pipe()

    class Stage:
        def run_task(self, plan, number):
            ours.close()  # the parent dies while the task goes on

    tasks = [(Stage(), 0)]

    class Told:
        def recv(self):
            return tasks.pop() if tasks else theirs.recv()

        def send(self, answer):
            theirs.send(answer)

    local._work(None, Told())
    assert not tasks
