"""Hydra's sweeps: several runs in the same processes."""

from pathlib import Path

import pytest

from tests.support import Trainer, read_metrics


@pytest.mark.slow
def test_runs_of_a_sweep_follow_one_another(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    arguments = (f"data.path={corpus}", f"runs_root={tmp_path}", "run=lr${optim.lr}", "steps=3")
    swept = trainer.run(*arguments, "optim.lr=0.001,0.002", "--multirun", ranks=2)
    assert swept.codes == (0, 0), swept.stderrs
    alone = trainer.run(*arguments, "run=alone", "optim.lr=0.002", ranks=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone",
        "lr0.001",
        "lr0.002",
        "multirun.yaml",
        "sweep.html",
    ]
    second = [line["train/loss"] for line in read_metrics(tmp_path / "lr0.002") if "train/loss" in line]
    assert second == pytest.approx(alone.series("train/loss"), rel=1e-6)
    assert len(second) == 3


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_job_that_fails_or_stops_there_where_told(
    trainer: Trainer, corpus: Path, tmp_path: Path
) -> None:
    """On two ranks, which stay one group of processes."""
    arguments = (f"data.path={corpus}", "run=m${micro_batch_size}", "steps=2", "micro_batch_size=3,4", "--multirun")
    swept = trainer.run(*arguments, f"runs_root={tmp_path}/on", ranks=2)
    assert swept.codes == (64, 64), swept.stderrs
    assert len(read_metrics(tmp_path / "on" / "m4")) == 2
    assert "sweep: 1 of 2 jobs finished, job 1 of 2 ended with exit code 64; the same command" in swept.stderr
    assert "sweep:" not in swept.stderrs[1]
    stopped = trainer.run(*arguments, f"runs_root={tmp_path}/fast", "--fail-fast", ranks=2)
    assert stopped.codes == (64, 64), stopped.stderrs
    assert not (tmp_path / "fast" / "m4").exists()
    assert "sweep: 0 of 2 jobs finished, job 1 of 2 ended with exit code 64, 1 not begun" in stopped.stderr
