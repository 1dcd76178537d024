"""The wheel, installed into a fresh environment: the commands work outside the checkout, from its files alone."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.support import ROOT, environment

_FIND = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
PACKAGES = [name.removesuffix("*") for name in _FIND["include"]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, and this one's packages (but not its editable Cloze) behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    _run(build, folder)
    venv.create(folder / "env", with_pip=False)
    executable = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--no-deps", "--no-index"]
    _run([*install, "--no-warn-script-location", str(wheel)], folder)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "zz-behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def _run(command: list[str], cwd: Path) -> str:
    env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_and_nothing_else(python: Path) -> None:
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    for package in PACKAGES:
        here, there = (
            {path.relative_to(root) for path in (root / package).rglob("*") if path.suffix in (".py", ".yaml")}
            for root in (ROOT, site)
        )
        assert there == here
        assert there, package
    installed = {path.name for path in site.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert installed == set(PACKAGES)


def test_the_commands_find_their_configuration(python: Path, tmp_path: Path) -> None:
    """Also where the user has a package `conf` of his own."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").write_text("raise ImportError('not ours')")
    for module, words in (("data_prep", "max_len"), ("launch", "optim.lr"), ("finetune", "data.train")):
        assert words in _run([str(python), "-m", module, "--help"], tmp_path)
    assert "hidden_size: 128" in _run(
        [str(python), "-m", "pretrain.train", "model=tiny", "run=r", "data.path=d", "--cfg", "job"], tmp_path
    )


def test_from_text_to_a_fine_tuned_model(python: Path, tmp_path: Path) -> None:
    """Prepare, verify, train, export, fine-tune, a suite: each a command, from the wheel alone."""

    def run(*command: str) -> str:
        return _run([str(python), "-m", *command], tmp_path)

    text = "\n\n".join(f"This is document {i}. It has a second sentence. And a third one, too." for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    prepare = ["source=text", "source.paths=[a.txt]", "out=shards", "max_len=32", "executor.workers=1"]
    run("data_prep", *prepare, "tokenizer.vocab_size=200")
    assert "is sound" in run("data_prep.verify", "shards")
    tiny = ["model=tiny", "model.hidden_size=32", "model.intermediate_size=64", "model.max_positions=32"]
    small = ["precision=fp32", "global_batch_size=8", "micro_batch_size=8", "steps=3", "data.workers=0", "eval.every=0"]
    run("pretrain.train", "run=r", "data.path=shards", *tiny, *small, "wandb.mode=disabled")
    assert "logits equal the trainer's" in run("pretrain.export", "runs/r", "out/r")
    rows = ["sentence1\tsentence2\tlabel", *["this document\thas\tentailment", "a third one\ttoo\tnot_entailment"] * 4]
    (tmp_path / "rte").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "rte" / name).write_text("\n".join(rows))
    own = ["suite=glue", "data=.", "num_seeds=2", "epochs=1", "batch_size=8", "baseline=false"]
    assert "| rte | accuracy |" in run("finetune.suite", "model=out/r", "out=out/glue", *own)
    files = [f"data.{name}=rte/{name}.tsv" for name in ("train", "dev")]
    assert "accuracy" in run("finetune", "task=rte", "model=out/glue/rte-pretrained", "out=out/rte", "epochs=1", *files)
    assert (tmp_path / "out" / "rte" / "model.safetensors").is_file()
