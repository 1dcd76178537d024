"""The command line: what a user mistypes becomes one line with the nearest valid name, and exit code 64."""

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloze import cli
from cloze.errors import DiskError, ExitCode, TrainingError, UserError
from cloze.log import log
from cloze.schema import Variant, doc
from data_prep.config import PrepConfig
from pretrain.config import TrainConfig
from tests.support import TINY, Trainer, environment

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line with which overrides are refused."""

    def refused(*overrides: str) -> str:
        def compose() -> int:
            cli.compose("train", TrainConfig, overrides)
            return 0

        assert cli.guarded(compose, TrainConfig) == ExitCode.USAGE
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert output.out == ""
        assert line.startswith("error: ")
        return line

    return refused


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("stepz=3", "steps"),
        ("global_batchsize=3", "global_batch_size"),
        ("optim.lrr=3", "optim.lr"),
        ("lr=3", "optim.lr"),
        ("data.worker=2", "data.workers"),
        ("checkpoint.evry=2", "checkpoint.every"),
        ("+stepz=3", "steps"),
        ("++optim.lrr=3", "optim.lr"),
        ("model.dropuot=0.1", "model.dropout"),
    ],
)
def test_a_typo_names_the_nearest_key(refusal: Refusal, typo: str, nearest: str) -> None:
    line = refusal("run=r", "data.path=d", typo)
    assert f"did you mean {nearest}?" in line
    assert typo.lstrip("+").partition("=")[0] in line


@pytest.mark.parametrize("override", ["model=tinny", "model=../tiny", "optim=adam", "schedule=lineal", "recipe=bert"])
def test_an_unknown_option_lists_the_group(refusal: Refusal, override: str) -> None:
    group = override.partition("=")[0]
    line = refusal("run=r", "data.path=d", override)
    assert group in line
    nearest = {"model": "tiny", "optim": "adamw", "schedule": "linear", "recipe": "bert_2018"}
    assert nearest[group] in line.partition(";")[2]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("steps=null", "steps"),
        ("steps=[1]", "steps"),
        ("optim.lr=fast", "optim.lr"),
        ("precision=fp8", "precision"),
        ("log.tensorboard=perhaps", "log.tensorboard"),
        ("optim.clip=-1", "optim.clip"),
        ("zero=4", "zero"),
        ("wandb.tags=one", "wandb.tags"),
    ],
)
def test_a_wrong_value_names_its_key(refusal: Refusal, override: str, key: str) -> None:
    assert f"error: {key}" in refusal("run=r", "data.path=d", override)


@pytest.mark.parametrize(
    "override", ["steps", "steps:3", "=3", "steps==", "a b=1", "steps={1", "~steps", "run=${nope}"]
)
def test_what_is_no_override_is_one_line(refusal: Refusal, override: str) -> None:
    refusal("run=r", "data.path=d", override)


@pytest.mark.parametrize(("given", "key"), [((), "run"), (("run=r",), "data.path")])
def test_a_missing_value_is_asked_for(refusal: Refusal, given: tuple[str, ...], key: str) -> None:
    assert f"{key}: has no value; add {key}=…" in refusal(*given)


def test_errors_become_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: Exception) -> Callable[[], int]:
        def action() -> int:
            raise error

        return action

    for kind, code in ((UserError, 64), (TrainingError, 70), (DiskError, 74)):
        assert cli.guarded(raising(kind("what, where, what to do")), TrainConfig) == code
        assert capsys.readouterr().err == "error: what, where, what to do\n"
    with pytest.raises(ZeroDivisionError):  # our own bug keeps its traceback
        cli.guarded(raising(ZeroDivisionError()), TrainConfig)


def test_who_speaks_in_a_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks find is said once per node; what one alone may have met, by that one."""

    def action(kind: type[UserError]) -> Callable[[], int]:
        def raising() -> int:
            raise kind("oops")

        return raising

    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    cli.guarded(action(UserError), TrainConfig)
    assert capsys.readouterr().err == ""
    cli.guarded(action(DiskError), TrainConfig)
    assert capsys.readouterr().err == "error: rank 5: oops\n"
    monkeypatch.setenv("LOCAL_RANK", "0")
    cli.guarded(action(UserError), TrainConfig)
    assert capsys.readouterr().err == "error: rank 5: oops\n"


def test_help_tells_every_key_with_default_and_meaning() -> None:
    text = cli.help_text("train", TrainConfig)
    for words in ("optim.lr", "peak learning rate", "[0.999]", "model        ", "tiny", "75 stopped", "required"):
        assert words in text
    assert all(len(line) > 2 for line in text.splitlines() if line.strip())
    prep = cli.help_text("prep", PrepConfig)
    assert "recipe" not in prep
    assert "what is mended and what is dropped\n" in prep  # a section has no value of its own
    assert "[true]" in prep  # as YAML writes it


# The whole way: argv, Hydra, exit status


@pytest.mark.parametrize(
    "override",
    [
        "stepz=3",
        "model=tinny",
        "model=3",
        "steps=many",
        "optim.beta1=2",
        "data.path=/nowhere",
        "run=a/b",
        "--stepz",
        "stepz",
    ],
)
def test_exit_64_with_one_line(trainer: Trainer, corpus: Path, override: str) -> None:
    result = trainer.run(f"data.path={corpus}", override)
    assert result.code == 64
    lines = result.stderr.splitlines()
    if override != "--stepz":  # argparse says its own two
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (result.run / "metrics.jsonl").exists()


@pytest.mark.parametrize("flags", [["--local_rank=0"], ["--local-rank", "0"]])
def test_the_launchers_local_rank_is_dropped(trainer: Trainer, flags: list[str]) -> None:
    result = trainer.run(*flags, "data.path=/nowhere", "run=r")
    assert result.errors == [result.stderr.rstrip("\n")]
    assert "/nowhere/manifest.json: not there" in result.stderr


def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    """Without the fork server, and from another directory; nothing is left there."""
    command = [sys.executable, "-m", "pretrain.train", *TINY, "run=r", "data.path=d", "stepz=3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 64
    assert done.stderr == "error: stepz: no such key (did you mean steps?); write steps=3, or see --help\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_help_and_cfg_job(trainer: Trainer, tmp_path: Path) -> None:
    for flags, words in ((["--help"], "optim.lr"), (["--cfg", "job"], "hidden_size: 32")):
        job = trainer.start("data.path=d", *flags)
        result = job.wait()
        assert result.code == 0
        assert words in (job.logs / "stdout-0").read_text()
        assert result.stderr == ""


# Sections that come in kinds


@dataclass(frozen=True, kw_only=True)
class ShapeConfig(Variant):
    colour: str = doc("name of a colour")


@dataclass(frozen=True, kw_only=True)
class CircleConfig(ShapeConfig, kind="circle"):
    radius: float = doc("metres")

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise UserError(f"shape.radius={self.radius}: must be positive")


@dataclass(frozen=True, kw_only=True)
class BoxConfig(ShapeConfig, kind="box"):
    width: float = doc("metres")
    sides: list[int] = doc("which are open")


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    shape: ShapeConfig = doc("what is drawn")
    copies: int = doc("how many")


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DrawingConfig]:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "circle.yaml").write_text("kind: circle\ncolour: red\nradius: 1.5\n")
    (tmp_path / "shape" / "box.yaml").write_text("kind: box\ncolour: blue\nwidth: ???\nsides: [1]\n")
    (tmp_path / "draw.yaml").write_text("defaults: [{shape: circle}, _self_]\ncopies: 2\n")
    monkeypatch.setattr("cloze.cli.schemas.CONF", tmp_path)
    return lambda *overrides: cli.compose("draw", DrawingConfig, overrides)


def test_a_kind_owns_its_keys(drawing: Callable[..., DrawingConfig]) -> None:
    assert drawing().shape == CircleConfig(kind="circle", colour="red", radius=1.5)
    box = drawing("shape=box", "shape.width=2", "shape.colour=green").shape
    assert box == BoxConfig(kind="box", colour="green", width=2.0, sides=[1])
    saved = {"shape": {"kind": "box", "colour": "red", "width": 1, "sides": []}, "copies": 1}
    assert cli.typed(saved, DrawingConfig).shape == BoxConfig(kind="box", colour="red", width=1.0, sides=[])
    assert list(ShapeConfig.kinds) == ["circle", "box"]
    assert Variant.kinds == {}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["shape=box", "shape.radius=1"],
            "shape.radius: of no use to shape=box, whose keys are kind, colour, width, sides",
        ),
        (["shape.width=1"], "shape.width: of no use to shape=circle, whose keys are kind, colour, radius"),
        (["+shape.width=1"], "shape.width: of no use to shape=circle, whose keys are kind, colour, radius"),
        (
            ["shape.radus=1"],
            "shape.radus: no such key (did you mean shape.radius?); write shape.radius=1, or see --help",
        ),
        (["shape=disc"], "shape=disc: no such option; there are box, circle"),
        (["shape.kind=boxx"], "shape.kind=boxx: no such kind (did you mean box?); there are circle, box"),
        (["shape.radius=-1"], "shape.radius=-1.0: must be positive"),
        (
            ["shape=box"],
            "shape.width: has no value; add shape.width=… to the command line (--help tells what it means)",
        ),
    ],
)
def test_a_key_of_another_kind_is_refused(
    drawing: Callable[..., DrawingConfig], capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    assert cli.guarded(lambda: bool(drawing(*overrides)), DrawingConfig) == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_kind_alone_can_be_typed() -> None:
    with pytest.raises(UserError, match=r"^width: of no use to circle, whose keys are kind, colour, radius$"):
        cli.typed({"kind": "circle", "colour": "red", "radius": 1, "width": 2}, CircleConfig)


def test_help_shows_the_keys_of_the_chosen_kind(drawing: Callable[..., DrawingConfig]) -> None:
    text = cli.help_text("draw", DrawingConfig, ["copies=many", "shape=box"])
    assert "shape.width" in text
    assert "one of: circle, box [box]" in text
    assert "shape.radius" not in text
    assert "shape.radius" in cli.help_text("draw", DrawingConfig)
    every = {key.name: key for key in cli.keys("draw", DrawingConfig)}
    assert every["shape.radius"] == ("shape.radius", "circle: metres", "1.5")
    assert every["shape.width"].default == "required"
    assert list(every) == [
        "shape",
        "shape.kind",
        "shape.colour",
        "shape.radius",
        "shape.width",
        "shape.sides",
        "copies",
    ]


# From a notebook


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("data_prep", ["outt=x"], "outt: no such key (did you mean out?)"),
        ("finetune", ["--cfg", "job", "modell=x"], "modell: no such key (did you mean model?)"),
        ("launch", ["run=r", "data.path=d", "hoststs=x", "--verbose"], "hoststs: no such key (did you mean hosts?)"),
        ("pretrain.train", ["run=r", "data.path=d", "--quiet", "stepz=1"], "stepz: no such key (did you mean steps?)"),
        ("pretrain.plan", ["--quiet", "gpus=0"], "gpus=0: must be at least 1"),
        ("data_prep.verify", ["nowhere", "--quiet"], "nowhere/manifest.json: not there"),
    ],
)
def test_a_command_returns_its_code(
    capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], line: str
) -> None:
    """It leaves argv, the streams and the caller's list as they were."""
    main = importlib.import_module(command).main
    before, given = (list(sys.argv), sys.stdout, sys.stderr, dict(os.environ)), list(arguments)
    assert main(arguments) == ExitCode.USAGE
    assert (list(sys.argv), sys.stdout, sys.stderr, dict(os.environ)) == before
    assert arguments == given
    assert capsys.readouterr().err.startswith(f"error: {line}")
    quiet, verbose = "--quiet" in arguments, "--verbose" in arguments
    assert log.level == (logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def test_hydras_flags_from_a_notebook(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    """A sweep runs once per value where it was called, and leaves nothing but its own file."""
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, str]] = []

    @cli.hydra_command("train", TrainConfig)
    def main(config: TrainConfig) -> int:
        seen.append((config.steps, str(Path.cwd())))
        return 70 if config.steps == 2 else 0

    argv = list(sys.argv)
    assert main(["run=r${steps}", "data.path=d", "runs_root=there", "steps=1,2,3", "--multirun"]) == 70
    assert seen == [(steps, str(tmp_path)) for steps in (1, 2, 3)]
    assert sys.argv == argv
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "there/multirun.yaml"
    ]
    assert "sweep: 2 of 3 jobs finished, job 2 of 3 ended with exit code 70; the same" in capsys.readouterr().err
    seen.clear()
    assert main(["run=r${steps}", "data.path=d", "--multirun", "runs_root=there", "--fail-fast", "steps=1,2,3"]) == 70
    assert [steps for steps, _ in seen] == [1, 2]
    assert "sweep: 1 of 3 jobs finished, job 2 of 3 ended with exit code 70, 1 not begun" in capsys.readouterr().err
    seen.clear()
    assert main(["run=r", "data.path=d", "--cfg", "job"]) == 0
    assert "hidden_size: 768" in capsys.readouterr().out
    assert main(["--help", "--quiet"]) == 0
    assert "optim.lr" in capsys.readouterr().out
    assert seen == []


def test_a_stop_ends_a_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Ctrl-C is meant for all of it; and after a full disk the next job would meet the same."""
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []
    told: list[list[int]] = []

    @cli.hydra_command("train", TrainConfig, after_sweep=lambda configs: told.append([one.steps for one in configs]))
    def main(config: TrainConfig) -> int:
        seen.append(config.steps)
        if config.steps == 2:
            raise KeyboardInterrupt
        return 0

    assert main(["run=r${steps}", "data.path=d", "runs_root=there", "steps=1,2,3,4", "--multirun"]) == 75
    assert seen == [1, 2]
    assert told == [[1, 2]]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: interrupted; the same command goes on",
        "sweep: 1 of 4 jobs finished, job 2 of 4 ended with exit code 75, 2 not begun; the same command goes on",
    ]


def test_packages_import_nothing_before_it_is_asked_for() -> None:
    source = (
        "import sys, cloze, cloze.corpus, data_prep, finetune, launch, pretrain, pretrain.data\n"
        "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)\n"
        "from data_prep import main\nfrom cloze.corpus import open_corpus\n"
        "from pretrain.train import main as train\n"
        "assert main(['--help']) == train(['--help']) == 0\n"
        "assert not {'torch', 'data_prep.prepare'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(AttributeError, match=r"^module 'data_prep' has no attribute 'nonsense'$"):
        importlib.import_module("data_prep").nonsense  # noqa: B018
