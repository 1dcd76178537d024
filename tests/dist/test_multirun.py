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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "lr0.001", "lr0.002", "multirun.yaml"]
    second = [line["train/loss"] for line in read_metrics(tmp_path / "lr0.002") if "train/loss" in line]
    assert second == pytest.approx(alone.series("train/loss"), rel=1e-6)
    assert len(second) == 3
