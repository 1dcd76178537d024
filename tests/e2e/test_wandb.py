"""Where W&B refuses, fails or falls silent in the midst of a run: the run goes on, and nothing is lost."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT, Trainer, environment
from tests.wandb_stub import KEY, WandbStub, wandb_stub

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow


def known(stub: WandbStub, tmp_path: Path) -> dict[str, str]:
    return {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY, "WANDB_CONFIG_DIR": str(tmp_path / "config")}


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def sync(stub: WandbStub, tmp_path: Path, line: str) -> None:
    """Run the command that a line tells."""
    words = line.partition("wandb sync ")[2].split()
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *words],
        cwd=ROOT,
        env=environment() | known(stub, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", [409, 404, 503, "silence"])
def test_a_server_that_fails_in_mid_run(trainer: Trainer, corpus: Path, tmp_path: Path, fault: int | str) -> None:
    """Training goes on to its end, says so once and how to send the rest, which then arrives."""
    with wandb_stub() as stub:
        stub.fault = lambda what: fault if what == "stream" else None
        variables = known(stub, tmp_path) | {"WANDB_FINISH_TIMEOUT": "2"}
        job = trainer.start(f"data.path={corpus}", "wandb.mode=auto", "steps=5000", "stop_at=4900", env=variables)
        job.wait_for(2)
        stderr = job.logs / "stderr-0"
        if fault != "silence":
            words = "takes no more of this run" if fault in (409, 404) else "does not answer as it should (503"
            wait_until(lambda: words in stderr.read_text(), words)
            told = job.run / "metrics.jsonl"
            steps = told.read_text().count("\n")
            job.wait_for(steps + 3)  # it goes on
        job.signal(0, 15)
        result = job.wait(120)
        assert result.codes == (75,), result.stderr
        (line,) = [line for line in result.stderr.splitlines() if "wandb sync" in line and "send this run" in line]
        assert "Traceback" not in result.stderr
        (run,) = stub.runs.values()
        assert run.rows == []
        stub.fault = lambda _: None
        stub.over.set()
        sync(stub, tmp_path, line)
        arrived = [row["step"] for row in run.rows if "train/loss" in row]
        assert arrived == [row["step"] for row in result.metrics]


def test_segments_that_were_logged_offline_are_sent_as_one_run(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """By the command that was printed last."""
    with wandb_stub() as stub:
        own = (f"data.path={corpus}", f"runs_root={tmp_path}", "wandb.mode=auto", "steps=9", "checkpoint.every=2")
        variables = known(stub, tmp_path) | {"WANDB_MODE": "dryrun"}
        for end in (3, 5, 9):
            result = trainer.run(*own, f"stop_at={end}", env=variables)
            assert result.code == (75 if end < 9 else 0), result.stderr
        assert stub.asked == []
        sync(stub, tmp_path, [line for line in result.stderr.splitlines() if "wandb sync" in line][-1])
        (run,) = stub.runs.values()
        losses = [(row["step"], row["train/loss"]) for row in run.rows if "train/loss" in row]
        assert losses == [(row["step"], pytest.approx(row["train/loss"])) for row in result.metrics]
        assert len(losses) == 9
