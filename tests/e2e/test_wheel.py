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

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


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


def test_a_corpus_is_prepared_and_verified(python: Path, tmp_path: Path) -> None:
    text = "\n\n".join(f"This is document {i}. It has a second sentence. And a third one, too." for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    prepare = ["data_prep", "source=text", "source.paths=[a.txt]", "out=shards", "max_len=32", "engine.workers=1"]
    _run([str(python), "-m", *prepare, "tokenizer.vocab_size=200"], tmp_path)
    assert "is sound" in _run([str(python), "-m", "data_prep.verify", "shards"], tmp_path)
