"""Runs that lost their checkpoints, stand in a foreign directory, or go on otherwise than they began."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.support import Result, Trainer, read_metrics


@pytest.fixture(scope="module")
def ended(trainer: Trainer, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of four steps."""
    root = tmp_path_factory.mktemp("ended")
    result = trainer.run(f"data.path={corpus}", f"runs_root={root}", "steps=4", "checkpoint.every=2")
    assert result.code == 0
    return result.run


def refusal(result: Result) -> str:
    assert result.code == 64, result.stderr
    (line,) = result.errors
    assert "Traceback" not in result.stderr
    return line


def test_without_a_sound_checkpoint_it_stops_and_keeps_its_metrics(
    trainer: Trainer, corpus: Path, ended: Path, tmp_path: Path
) -> None:
    """Case 51: damaged, and moved away; twice, since the first refusal must hide nothing from the second."""
    shutil.copytree(ended, tmp_path / "run")
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "steps=6")
    for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
        with (path / "model.safetensors").open("ab") as file:
            file.write(b"x")
    for _ in range(2):
        assert "was saved up to step 4" in refusal(trainer.run(*overrides, ranks=2))
        assert read_metrics(tmp_path / "run") == read_metrics(ended)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "moved")
    assert "there is none" in refusal(trainer.run(*overrides))
    assert read_metrics(tmp_path / "run") == read_metrics(ended)


def test_a_directory_of_another_tool_is_left_alone(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Case 52."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 3\n")
    line = refusal(trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}", ranks=2))
    assert "holds config.yaml, which no run of Cloze wrote" in line
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 3\n"


def test_other_heads_are_another_model(trainer: Trainer, corpus: Path, ended: Path, tmp_path: Path) -> None:
    """Case 54: no shape differs, in a resume or from `init_from`."""
    shutil.copytree(ended, tmp_path / "run")
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "steps=6", "model.num_heads=1")
    assert "was trained with model.num_heads=2, now it is 1" in refusal(trainer.run(*overrides))
    line = refusal(trainer.run(*overrides, "run=other", f"init_from={ended}"))
    assert "is another model than this run's; add model.num_heads=2" in line


def test_what_changed_is_told_and_kept(trainer: Trainer, corpus: Path, ended: Path, tmp_path: Path) -> None:
    """Cases 54 and 26."""
    shutil.copytree(ended, tmp_path / "run")
    result = trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}", "steps=8", "optim.weight_decay=0.3")
    assert result.code == 0, result.stderr
    assert "changed since step 4: " in result.stderr
    assert "optim.weight_decay 0.01 -> 0.3" in result.stderr
    assert "the learning rate jumps from" in result.stderr
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
    assert (row["step"], row["changed"]["steps"]) == (4, ["4", "8"])


def test_a_model_no_better_than_guessing_says_so(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Case 58."""
    overrides = (f"data.path={corpus}", f"runs_root={tmp_path}", "steps=8", "log.every=1", "optim.lr=100")
    overrides += ("schedule.warmup_fraction=0",)
    result = trainer.run(*overrides)
    assert result.code == 0, result.stderr
    assert "is no better than guessing" in result.stderr
    assert "is no better than guessing" in json.loads((tmp_path / "run" / "status.json").read_text())["verdict"]
    stopped = trainer.run(*overrides, "run=stopped", "guard.give_up_loss=8", ranks=2)
    assert 70 in stopped.codes
    assert "the loss has stayed above guard.give_up_loss=8" in stopped.errors[0]


def test_a_budget_that_is_spent_before_the_first_step(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Case 60."""
    result = trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}", "budget.hours=1e-9", ranks=2)
    assert "at most, in 1e-09 hours" in result.stderr
    assert "budget.hours=1e-09: was spent before the first step" in refusal(result)


def test_one_run_for_a_sweep_is_refused(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    """Case 53: before anything is trained."""
    line = refusal(trainer.run(f"data.path={corpus}", f"runs_root={tmp_path}", "run=x", "seed=1,2", "--multirun"))
    assert "run=x-${hydra:job.num} or run=x-${seed}" in line
    assert not list(tmp_path.iterdir())
    named = trainer.run(
        f"data.path={corpus}", f"runs_root={tmp_path}", "run=x${hydra:job.num}", "seed=1,2", "steps=1", "--multirun"
    )
    assert named.code == 0, named.stderr
    assert {"x0", "x1"} <= {path.name for path in tmp_path.iterdir()}
