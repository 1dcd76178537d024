"""The run directory: one job at a time, and what it says about itself."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cloze.errors import DiskError, UserError
from pretrain import run_directory
from pretrain.run_directory import RunDirectory


def test_a_second_job_is_refused_while_the_first_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "runs" / "a"
    first = RunDirectory(path)
    with pytest.raises(UserError, match="another job is training in it; wait for it, or name another run") as caught:
        RunDirectory(path)
    assert "\n" not in str(caught.value)
    RunDirectory(tmp_path / "runs" / "b").close()
    first.close()
    RunDirectory(path).close()


def test_a_lock_that_a_dying_job_still_holds_is_waited_for(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "a")
    threading.Timer(0.3, first.close).start()
    RunDirectory(tmp_path / "a").close()


def test_a_killed_job_leaves_no_lock(tmp_path: Path) -> None:
    """The lock is the kernel's: it goes with the process, not with the file."""
    pid = os.fork()
    if pid == 0:
        kept = RunDirectory(tmp_path / "a")
        os.kill(os.getpid(), 9)
        kept.close()
    os.waitpid(pid, 0)
    RunDirectory(tmp_path / "a").close()


def test_what_it_tells(tmp_path: Path) -> None:
    tokenizer = tmp_path / "corpus-tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("[PAD]\n")
    directory = RunDirectory(tmp_path / "a")
    assert directory.ranks_before() is None
    directory.describe("run: a\n", tokenizer, world_size=2)
    assert directory.ranks_before() == 2
    directory.describe("run: a\nsteps: 3\n", tokenizer, world_size=4)  # every start tells anew
    directory.write_status(75, 12)
    directory.close()
    path = tmp_path / "a"
    assert (path / "config.yaml").read_text() == "run: a\nsteps: 3\n"
    assert json.loads((path / "environment.json").read_text())["world_size"] == 4
    assert (path / "tokenizer" / "vocab.txt").read_text() == "[PAD]\n"
    status = json.loads((path / "status.json").read_text())
    assert (status["exit_code"], status["step"]) == (75, 12)
    assert not list(path.glob(".*.tmp"))


def test_a_place_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be created") as caught:
            RunDirectory(path)
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer").mkdir()
    directory = RunDirectory(tmp_path / "a")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left on device; free space and run the same command again"):
        directory.describe("run: a\n", tmp_path / "tokenizer", 1)
    directory.write_status(74, 3)  # the exit code tells it too
    directory.close()
