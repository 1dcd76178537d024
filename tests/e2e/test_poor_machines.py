"""Machines as people have them: a small /dev/shm, few open files, no name for the user."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import ROOT, TINY, environment, read_metrics

pytestmark = pytest.mark.slow


def train(before: Sequence[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run of one rank in a process that the command `before` starts."""
    return subprocess.run(
        [*before, sys.executable, "-m", "pretrain.train", *TINY, *overrides],
        cwd=ROOT,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root may mount a small /dev/shm")
def test_shared_memory_without_room(corpus: Path, tmp_path: Path) -> None:
    """Docker gives a container 64 MiB. One line says it; without loader processes it is not needed."""
    small = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"', "sh")
    own = (f"data.path={corpus}", f"runs_root={tmp_path}", "run=r")
    full = train(small, *own, "data.workers=1")
    assert full.returncode == 74, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error:")]
    assert "/dev/shm: no room for the loader's batches" in line
    assert "Traceback" not in full.stderr
    done = train(small, *own)
    assert done.returncode == 0, done.stderr


def test_few_open_files(corpus: Path, tmp_path: Path) -> None:
    """256, as macOS and some schedulers have it, suffice, with loader processes that hand over hundreds of batches."""
    few = ("sh", "-c", 'ulimit -n 256 && exec "$@"', "sh")
    own = (f"data.path={corpus}", f"runs_root={tmp_path}", "run=r", "steps=200", "data.workers=2", "data.prefetch=64")
    done = train(few, *own)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "r")) == 200


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root may be somebody else")
def test_a_user_without_a_name(corpus: Path, tmp_path: Path) -> None:
    """Kubernetes' `runAsUser`: no entry in passwd, no HOME."""
    nobody = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "env", "-u", "HOME", "-u", "USER")
    if subprocess.run([*nobody, sys.executable, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("this Python is for its owner alone")
    for path in (tmp_path, *tmp_path.parents[:2], *corpus.parents[:2]):
        path.chmod(0o777)
    done = train((*nobody, "-u", "LOGNAME"), f"data.path={corpus}", f"runs_root={tmp_path}/runs", "run=r")
    assert done.returncode == 0, done.stderr
