"""What changed since a checkpoint: another architecture is refused, another way to train is told."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloze import cli
from cloze.errors import UserError
from pretrain.changes import (
    CHANGES,
    changed,
    describe_changes,
    learning_rate_jump,
    note,
    read_changes,
    refuse_other_architecture,
)
from pretrain.config import ModelConfig, TrainConfig, as_data


def config(*overrides: str) -> TrainConfig:
    return cli.compose("train", TrainConfig, ["run=a", "data.path=x", "model=tiny", "optim.lr=1e-4", *overrides])


def saved(*overrides: str) -> str:
    return yaml.safe_dump(as_data(asdict(config(*overrides))))


ARCHITECTURE = (
    *("architecture", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "extra"),
)
OTHERWISE = (
    *("name", "dropout", "attention_dropout", "attention", "pad_vocab_to", "activation_checkpointing"),
    *("init", "init_std", "position_init", "distance_bias"),
)


def told(then: str, now: str, config: TrainConfig, step: int) -> list[str]:
    """The lines that a start says."""
    found = changed(then, now)
    lines = [describe_changes(found, step)] if found else []
    return [*lines, *([jump] if (jump := learning_rate_jump(then, config, step)) else [])]


def test_every_key_of_the_model_is_architecture_or_not() -> None:
    """A new key is taken for architecture, and is entered here."""
    known = {*ARCHITECTURE, *OTHERWISE}
    assert known == {*ModelConfig.__dataclass_fields__}


@pytest.mark.parametrize("key", ARCHITECTURE)
def test_another_architecture_is_refused_though_no_shape_may_tell(key: str) -> None:
    now = as_data(asdict(config().model))
    others = {"architecture": "modernbert", "extra": {"type_vocab_size": 1}}
    then: dict[str, Any] = {"model": {**now, key: others[key] if key in others else 2 * now[key]}}
    with pytest.raises(UserError, match=rf"^ckpt: was trained with model\.{key}=.*resume with the same") as caught:
        refuse_other_architecture("ckpt", yaml.safe_dump(then), now)
    assert "\n" not in str(caught.value)
    del then["model"][key]  # an older checkpoint's
    refuse_other_architecture("ckpt", yaml.safe_dump(then), now)


@pytest.mark.parametrize("key", OTHERWISE)
def test_what_leaves_the_function_the_same_is_not_refused(key: str) -> None:
    now = as_data(asdict(config().model))
    refuse_other_architecture("ckpt", yaml.safe_dump({"model": {**now, key: "other"}}), now)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=5e-5", "optim.lr 0.0001 -> 5e-05"),
        ("optim.weight_decay=0.3", "optim.weight_decay 0.01 -> 0.3"),
        ("model.dropout=0.3", "model.dropout 0.1 -> 0.3"),
        ("precision=fp32", "precision bf16 -> fp32"),
        ("model.distance_bias=[[0,1],[0.5,0]]", "model.distance_bias 0 -> [[0, 1], [0.5, 0]]"),
        ("schedule=cosine", "schedule.kind linear -> cosine"),
        ("guard.spike_factor=2", "guard.spike_factor null -> 2"),
    ],
)
def test_another_way_to_train_is_told(override: str, line: str) -> None:
    overrides = ("precision=bf16",)
    (found,) = told(saved(*overrides), saved(*overrides, override), config(*overrides, override), 4000)
    assert found.startswith(f"changed since step 4000: {line}")


@pytest.mark.parametrize(
    "override",
    [
        *("runs_root=/x", "stop_at=3", "log.every=1", "data.workers=0", "wandb.mode=offline", "eval.every=7"),
        *("model.init=fixed", "model.init_std=0.5", "model.position_init=normal"),  # of fresh weights only
    ],
)
def test_what_does_not_touch_the_weights_is_not_told(override: str) -> None:
    assert told(saved(), saved(override), config(override), 10) == []


def test_more_steps_after_the_end_make_the_rate_jump() -> None:
    """Case 26. In mid-run, too, where it is enough."""
    lines = told(saved("steps=100"), saved("steps=200"), config("steps=200"), 100)
    assert lines[0] == "changed since step 100: steps 100 -> 200"
    assert lines[1].startswith("the learning rate jumps from 1.")
    assert "at step 100, since steps was 100 and is 200" in lines[1]
    assert len(told(saved("steps=100"), saved("steps=110"), config("steps=110"), 20)) == 1
    constant = ("schedule=constant", "schedule.warmup_fraction=0")
    assert (
        len(told(saved(*constant, "steps=100"), saved(*constant, "steps=200"), config(*constant, "steps=200"), 100))
        == 1
    )
    assert len(told(saved("steps=100"), saved("steps=100"), config("steps=100"), 100)) == 0


def test_a_key_of_another_version_is_left_out() -> None:
    then = yaml.safe_load(saved())
    then["optim"]["gone"] = 1
    del then["optim"]["eps"], then["guard"]
    assert changed(yaml.safe_dump(then), saved()) == {}


def test_the_record_keeps_every_stretch(tmp_path: Path) -> None:
    note(tmp_path, {}, 10)
    assert not (tmp_path / CHANGES).exists()
    assert read_changes(tmp_path) == {}
    note(tmp_path, {"optim.lr": ("1", "2")}, 4000)
    note(tmp_path, {"optim.lr": ("1", "3"), "zero": ("0", "1")}, 4000)  # the start before did not get far
    note(tmp_path, {"optim.lr": ("3", "1")}, 5000)
    with (tmp_path / CHANGES).open("a") as file:
        file.write('{"step": 3, "chan')
    assert read_changes(tmp_path) == {
        "changed at step 4,000": "optim.lr 1 -> 3, zero 0 -> 1",
        "changed at step 5,000": "optim.lr 3 -> 1",
    }
