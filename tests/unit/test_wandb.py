"""W&B's own client against a server on loopback that answers as W&B's does (tests/wandb_stub.py)."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloze.cli import compose
from pretrain.config import TrainConfig
from pretrain.telemetry.sinks import Telemetry, open_telemetry
from tests.fuzz.wandb_answers import fuzz_run
from tests.wandb_stub import KEY, Run, WandbStub, wandb_stub

wandb = pytest.importorskip("wandb")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbStub]:
    """The server, and W&B's client as it starts in a new process."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a prompt would fail
    with wandb_stub() as server:
        known = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_CONFIG_DIR": str(tmp_path / "config")}
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        yield server
        wandb.teardown()


def opened(folder: Path, resume_step: int | None = None, wandb_id: str | None = None) -> Telemetry:
    config = compose("train", TrainConfig, ["run=r", "data.path=d", "steps=300", "wandb.tags=['http://a:hunter2@b/c']"])
    resolved = {"steps": 300, "upload": "file:///x?token=hunter2"}
    return open_telemetry(config, folder, resume_step=resume_step, wandb_id=wandb_id, resolved=resolved)


def test_a_run_online_that_is_resumed_is_one(stub: WandbStub, tmp_path: Path) -> None:
    for resume_step, steps in ((None, (10, 20, 30)), (20, (25, 35))):
        telemetry = opened(tmp_path, resume_step)
        for step in steps:
            telemetry.log(step, {"train/loss": step / 2})
        telemetry.close(0)
    assert telemetry.wandb_id
    assert [*stub.runs] == [telemetry.wandb_id]
    run = stub.runs[telemetry.wandb_id]
    assert [(row["step"], row["train/loss"]) for row in run.rows] == [(s, s / 2) for s in (10, 20, 30, 25, 35)]
    assert (run.project, run.display_name, run.exit_code) == ("cloze", "r", 0)
    assert run.tags == ("http://[redacted]@b/c",)
    assert json.loads(run.config)["upload"]["value"] == "file:///x?token=[redacted]"


def test_a_run_that_was_deleted_there_goes_on_under_a_new_id(
    stub: WandbStub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all rows so far. The next checkpoint has it; one from before does not bring the old one back."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")  # W&B's client tries a 409 again as long as that
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train/loss": 5.0, "time": 1.0}\n')
    stub.runs["old"] = Run(deleted=True)
    telemetry = opened(tmp_path, 10, "old")
    telemetry.log(20, {"train/loss": 4.0})
    telemetry.close(0)
    new = telemetry.wandb_id
    assert new
    assert new != "old"
    assert f"W&B: run old was deleted there; this one goes on as {new}," in capsys.readouterr().err
    assert [row["step"] for row in stub.runs[new].rows] == [10, 20]
    assert stub.runs["old"].rows == []
    again = opened(tmp_path, 20, "old")
    again.close(0)
    assert again.wandb_id == new


def test_a_key_that_is_refused_keeps_the_run_on_disk(
    stub: WandbStub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fault = lambda _: 401
    telemetry = opened(tmp_path)
    telemetry.log(10, {"train/loss": 5.0})
    telemetry.close(0)
    printed = capsys.readouterr().err
    assert printed.count("W&B: not reached (") == 1
    assert printed.count("W&B: send this run with  wandb sync ") == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert "hunter2" not in printed


def test_answers_at_random_stop_nothing(stub: WandbStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor lose a row: fuzz_run looks. All are changed from when the run has begun."""
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    fuzz_run(stub, tmp_path, seed=6)
    assert "UpsertBucket" in stub.asked
