"""The suite as a command: pretrained against random weights, the table in Markdown, JSON and the model card."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import entry
from data_prep.errors import UserError
from finetune import suite
from finetune.config import SuiteConfig
from pretrain.card import CARD, _section
from tests.support import ROOT
from tests.unit.tiny_bert import write_tiny_bert

OWN = ["suite=glue", "num_seeds=2", "epochs=1", "batch_size=8", "lr=1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for task in ("sst2", "rte"):
        (folder / task).mkdir()
        for name, count in (("train", 40), ("dev", 20)):
            labels = rng.integers(0, 2, count)
            rows = [f"{('bad', 'good')[label]} film\tthe film\t{label}" for label in labels]
            head = "sentence\tidx\tlabel" if task == "sst2" else "sentence1\tsentence2\tlabel"
            (folder / task / f"{name}.tsv").write_text("\n".join([head, *rows]))
    return folder


def settings(data: Path, model: Path, out: Path, *own: str) -> SuiteConfig:
    return entry.compose("suite", SuiteConfig, [*OWN, f"data={data}", f"model={model}", f"out={out}", *own])


def test_table_against_random_weights_and_a_second_call_that_keeps_it(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_bert(tmp_path / "model", layers=1)
    (model / CARD).write_text("# model\n" + _section("evaluation", "none yet") + "end\n")
    assert suite.main(settings(data, model, tmp_path / "out", "tasks=[rte,cola]")) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert (model / CARD).read_text() == "# model\n" + _section("evaluation", text) + "end\n"
    assert text in capsys.readouterr().out
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(body) == ["rte"]
    ours, random = (100 * body["rte"][init]["accuracy"] for init in ("pretrained", "random"))
    spread = [100 * body["rte"][init]["std"]["accuracy"] for init in ("pretrained", "random")]
    expected = (
        f"| rte | accuracy | {ours:.1f} ± {spread[0]:.1f} | {random:.1f} ± {spread[1]:.1f} | {ours - random:+.1f} |"
    )
    assert expected in text
    assert "2 seeds. 1 epochs, batch 8, learning rate 0.001, 128 tokens. No data: cola." in text
    stamp = (tmp_path / "out" / "rte-random" / "metrics.json").stat().st_mtime_ns
    assert suite.main(settings(data, model, tmp_path / "out", "tasks=[rte]")) == 0
    assert (tmp_path / "out" / "rte-random" / "metrics.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"rte-pretrained: was made with other settings"):
        suite.main(settings(data, model, tmp_path / "out", "tasks=[rte]", "epochs=2"))
    with pytest.raises(UserError, match=r"data=.*: has no task of clue; tnews/train\.tsv, say, is needed"):
        suite.main(settings(data, model, tmp_path / "out", "suite=clue"))
    with pytest.raises(UserError, match=r"tasks: suite=glue has .*, no tnews"):
        settings(data, model, tmp_path, "tasks=[tnews]")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


def test_a_grid_by_multirun(tmp_path: Path, data: Path) -> None:
    """Two learning rates from one command line: a directory each, named after the value."""
    write_tiny_bert(tmp_path / "model", layers=1)
    files = [f"data.{name}={data}/sst2/{name}.tsv" for name in ("train", "dev")]
    grid = ["optim.lr=1e-3,1e-4", "out=grid/lr-${optim.lr}"]
    done = run("finetune", "--multirun", "task=sst2", "model=model", "epochs=1", *files, *grid, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bodies = [json.loads((folder / "metrics.json").read_text()) for folder in sorted((tmp_path / "grid").iterdir())]
    assert [body["lr"] for body in bodies] == [1e-4, 1e-3]


def test_the_command_line_of_the_suite(tmp_path: Path) -> None:
    told = run("finetune.suite", "--help", cwd=tmp_path)
    assert told.returncode == 0
    assert re.search(r"^python -m finetune\.suite ", told.stdout)
    refused = run("finetune.suite", "model=none", "out=o", "suite=superglue", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (64, "error: suite=superglue: no such suite; there are glue, clue\n")
