"""Case 24: an empty path or name, of a variable that is not set, is refused by every command, for every key."""

import copy
import functools
from dataclasses import asdict, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from cloze import cli
from cloze.cli.composition import refuse_empty, refuse_one_run_for_all
from cloze.errors import UserError
from data_prep import verify
from data_prep.config import PrepConfig
from finetune.config import FinetuneConfig, SuiteConfig
from launch.options import parse
from pretrain.config import TrainConfig
from pretrain.export import __main__ as export

COMMANDS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "train": (TrainConfig, ("run=a", "data.path=x")),
    "prep": (PrepConfig, ("out=x", "source=text", "source.paths=[a]")),
    "finetune": (FinetuneConfig, ("model=x", "out=x")),
    "suite": (SuiteConfig, ("model=x", "out=x", "suite=glue")),
}


def texts(schema: type[Any], prefix: str = "") -> list[str]:
    """The keys that hold a text."""
    found = []
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            found += texts(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif kind is str or str in get_args(kind):
            found.append(prefix + name)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_no_key_takes_an_empty_text(command: str) -> None:
    schema, needed = COMMANDS[command]
    whole = asdict(cli.compose(command, schema, needed))
    for key in texts(schema):
        body = copy.deepcopy(whole)
        *sections, leaf = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, body)
        for empty in ("", " ", ["a", ""]):
            section[leaf] = empty
            with pytest.raises(UserError, match=f"^{key}: empty") as caught:
                refuse_empty(body)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["init_from", "checkpoint.upload", "data.path", "data.cache_dir", "runs_root"])
def test_what_it_says(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: empty \(is a variable of the shell unset\?\); give it a value"):
        cli.compose("train", TrainConfig, ["run=a", "data.path=x", f"{key}="])


@pytest.mark.parametrize("arguments", [["", "out"], ["runs/a", ""], ["runs/a", " ", "--force"], ["a", "b", "--push="]])
def test_arguments_are_not_empty(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An empty path would be the working directory."""
    assert export.main(arguments) == 64
    assert "empty (is a variable of the shell unset?)" in capsys.readouterr().err
    assert verify.main([""]) == 64


def test_options_of_launch_are_not_empty() -> None:
    for option in ("hosts", "procs", "ssh", "restarts"):
        with pytest.raises(UserError, match=f"^{option}=: "):
            parse([f"{option}="])
    assert parse(["forward="]).forward == ()


# Sweeps (case 53)


def sweep(*overrides: str) -> None:
    refuse_one_run_for_all("train", TrainConfig, ["data.path=x", *overrides])


def test_jobs_of_a_sweep_have_a_run_each() -> None:
    with pytest.raises(UserError, match="run=x: is that of several jobs of the sweep; name one for each") as caught:
        sweep("run=x", "optim.lr=0.1,0.2", "--multirun")
    assert "run=x-${hydra:job.num} or run=x-${optim.lr}" in str(caught.value)
    with pytest.raises(UserError, match="several jobs"):
        sweep("run=x${optim.lr}", "optim.lr=0.1,0.2", "seed=1,2", "-m")
    for fine in (
        ("run=x${optim.lr}", "optim.lr=0.1,0.2"),
        ("run=x,y",),
        ("run=x-${hydra:job.num}", "seed=1,2"),
        ("run=x", "runs_root=a,b"),
        ("run=x", "seed=1"),
    ):
        sweep(*fine, "--multirun")
    sweep("run=x", "seed=1")
    refuse_one_run_for_all("prep", PrepConfig, ["out=x", "seed=1,2", "--multirun"])  # it has no runs
