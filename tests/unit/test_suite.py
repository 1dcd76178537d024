"""The suite as a command: pretrained against random weights, the table in Markdown, JSON and the model card."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cloze import cli
from cloze.errors import UserError
from finetune import predict, suite
from finetune import train as training
from finetune.config import FinetuneConfig, SuiteConfig
from finetune.families import SUITES
from finetune.tasks import Prepared
from pretrain.export.card import CARD, _section
from tests.support import ROOT
from tests.unit.test_finetune_data import GLUE
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
    return cli.compose("suite", SuiteConfig, [*OWN, f"data={data}", f"model={model}", f"out={out}", *own])


@pytest.mark.slow
def test_table_against_random_weights_and_a_second_call_that_keeps_it(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_bert(tmp_path / "model", layers=1)
    (model / CARD).write_text("# model\n" + _section("evaluation", "none yet") + "end\n")
    assert suite.run(settings(data, model, tmp_path / "out", "tasks=[rte,cola]")) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert (model / CARD).read_text() == "# model\n" + _section("evaluation", text) + "end\n"
    assert text in capsys.readouterr().out
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(body) == ["rte"]
    config = body["rte"]["pretrained"]["config"]
    assert (config["optim"]["lr"], config["epochs"], config["batch_size"]) == (1e-3, 1, 8)
    medians, cells = [], []
    for init in ("pretrained", "random"):
        runs = [100 * run["accuracy"] for run in body["rte"][init]["by_seed"].values()]
        medians.append(statistics.median(runs))
        cells.append(spread(runs))
    own = f" | {cells[0]} | {cells[1]} | {medians[0] - medians[1]:+.1f} |"
    guessing = 100 * body["rte"]["pretrained"]["guessing"]["accuracy"]
    assert f"| rte | accuracy{own} {guessing:.1f} | 0.0% |" in text
    assert f"| average | {own} " in text  # of one task
    assert "; median of 2 seeds, in brackets mean and standard error; guessing: " in text
    assert "Batch 8, learning rate 0.001, 64 tokens; epochs: rte 1." in text
    assert "one task. No data: cola." in text
    stamp = (tmp_path / "out" / "rte-random" / "metrics.json").stat().st_mtime_ns
    assert suite.run(settings(data, model, tmp_path / "out", "tasks=[rte]")) == 0
    assert (tmp_path / "out" / "rte-random" / "metrics.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        UserError, match=r"rte-pretrained: was made with another epochs; remove it, or name another out"
    ):
        suite.run(settings(data, model, tmp_path / "out", "tasks=[rte]", "epochs=2"))
    with pytest.raises(UserError, match=r"data=.*: has no task of clue; tnews/train\.tsv, say, is needed"):
        suite.run(settings(data, model, tmp_path / "out", "suite=clue"))
    with pytest.raises(UserError, match=r"tasks: suite=glue has .*, no tnews"):
        settings(data, model, tmp_path, "tasks=[tnews]")


@pytest.mark.slow
def test_scores_of_another_model_or_other_data_are_not_taken_for_these(tmp_path: Path, data: Path) -> None:
    """Under the same names: the model is exported anew, then the data change."""
    model, own = write_tiny_bert(tmp_path / "model", layers=1), ["tasks=[sst2]", "baseline=false"]
    (tmp_path / "data").mkdir()
    shutil.copytree(data / "sst2", tmp_path / "data" / "sst2")
    assert suite.run(settings(tmp_path / "data", model, tmp_path / "out", *own)) == 0
    (model / CARD).write_text("the table goes there")  # this is not another model
    assert suite.run(settings(tmp_path / "data", model, tmp_path / "out", *own)) == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"sst2-pretrained: was made with another model; remove it"):
        suite.run(settings(tmp_path / "data", model, tmp_path / "out", *own))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert suite.run(settings(tmp_path / "data", model, tmp_path / "out", *own)) == 0
    with (tmp_path / "data" / "sst2" / "dev.tsv").open("a") as file:
        file.write("\ngood film\tthe film\t1")
    with pytest.raises(UserError, match=r"sst2-pretrained: was made with another data\.dev; remove it"):
        suite.run(settings(tmp_path / "data", model, tmp_path / "out", *own))


@pytest.mark.slow
def test_mnli_has_two_halves_and_its_own_names(tmp_path: Path) -> None:
    """GLUE's own files. In the average both halves are one task."""
    model = write_tiny_bert(tmp_path / "model", layers=1)
    for task, names in (("mnli", ("train", "dev_matched", "dev_mismatched")), ("rte", ("train", "dev"))):
        (tmp_path / task).mkdir()
        label = "gold_label" if task == "mnli" else "label"
        rows = ["good\tfilm\tentailment", f"bad\tfilm\t{'neutral' if task == 'mnli' else 'not_entailment'}"] * 8
        for name in names:
            text = "\n".join([f"sentence1\tsentence2\t{label}", *rows[: 9 if name.endswith("mismatched") else 16]])
            (tmp_path / task / f"{name}.tsv").write_text(text)
    assert suite.run(settings(tmp_path, model, tmp_path / "out", "tasks=[mnli,rte]", "batch_size=2", "lr=1e-4")) == 0
    body = json.loads((tmp_path / "out" / "results.json").read_text())
    table = dict(re.findall(r"^\| ([^|]+) \| [^|]* \| ([^|]+) \|", (tmp_path / "out" / "results.md").read_text(), re.M))
    runs = [list(body[task]["pretrained"]["by_seed"].values()) for task in ("mnli", "rte")]
    averages = []
    for mnli, rte in zip(*runs, strict=True):
        averages.append(100 * ((mnli["accuracy"] + mnli["mismatched_accuracy"]) / 2 + rte["accuracy"]) / 2)
    assert table["average"] == spread(averages)
    other = [100 * run["mismatched_accuracy"] for run in runs[0]]
    assert table["mnli, mismatched"] == spread(other)
    assert list(table) == ["task", "---", "mnli", "mnli, mismatched", "rte", "average"]


def spread(percent: list[float]) -> str:
    error = statistics.stdev(percent) / len(percent) ** 0.5
    return f"{statistics.median(percent):.1f} ({statistics.fmean(percent):.1f} ± {error:.1f})"


def test_two_files_for_one_set_are_refused(tmp_path: Path) -> None:
    """CLUE's folder of OCNLI has its training data in five sizes."""
    (tmp_path / "ocnli").mkdir()
    for name in ("train.3k.json", "train.50k.json", "dev.json"):
        (tmp_path / "ocnli" / name).write_text("")
    with pytest.raises(UserError, match=r"data: which is train\? .*train\.3k\.json, .*train\.50k\.json; leave one"):
        suite.run(settings(tmp_path, tmp_path, tmp_path / "out", "suite=clue"))


def test_small_sets_get_more_epochs(tmp_path: Path) -> None:
    own = cli.compose("suite", SuiteConfig, [f"model={tmp_path}", "out=o"])
    found = {task: getattr(suite._settings(own, task), "epochs", None) for task in ("rte", "mrpc", "qqp")}
    assert found == {"rte": 10, "mrpc": 5, "qqp": 3}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_a_grid_by_multirun(tmp_path: Path, data: Path) -> None:
    """Two learning rates from one command line: a directory each, named after the value."""
    write_tiny_bert(tmp_path / "model", layers=1)
    files = [f"data.{name}={data}/sst2/{name}.tsv" for name in ("train", "dev")]
    grid = ["optim.lr=1e-3,1e-4", "out=grid/lr-${optim.lr}"]
    done = run(
        "finetune", "--multirun", "task=sst2", "model=model", "epochs=1", "max_len=64", *files, *grid, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    bodies = [json.loads((folder / "metrics.json").read_text()) for folder in sorted((tmp_path / "grid").iterdir())]
    assert [body["config"]["optim"]["lr"] for body in bodies] == [1e-4, 1e-3]
    # results on stdout are what we print, and nobody tells of accelerators
    assert len(done.stdout.splitlines()) == 12, done.stdout  # three of each, and the table
    assert "| lr-0.001 | 0.001 |" in done.stdout
    ours = (
        r"starting: |seed |optim\.lr=(0\.001|0\.0001): as given$|warning: seed 1: the model |"
        r"grid/lr-.*: finished; |sweep: 2 of 2 "
    )
    assert all(re.match(ours, line) for line in done.stderr.splitlines()), done.stderr


def test_the_command_line_of_the_suite(tmp_path: Path) -> None:
    told = run("finetune.suite", "--help", cwd=tmp_path)
    assert told.returncode == 0
    assert re.search(r"^python -m finetune\.suite ", told.stdout)
    refused = run("finetune.suite", "model=none", "out=o", "suite=superglue", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (64, "error: suite=superglue: no such suite; there are glue, clue\n")


NINE: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[str, str]]] = {
    # columns of the texts and of the label in GLUE's own rows, and its names for a bad and for a good text
    "cola": ((3,), (1,), ("0", "1")), "sst2": ((0,), (1,), ("0", "1")), "mrpc": ((3, 4), (0,), ("0", "1")),
    "stsb": ((7, 8), (9,), ("0.500", "4.500")), "qqp": ((3, 4), (5,), ("0", "1")),
    "mnli": ((8, 9), (10, 11), ("contradiction", "entailment")),
    "qnli": ((1, 2), (3,), ("not_entailment", "entailment")), "rte": ((1, 2), (3,), ("not_entailment", "entailment")),
    "wnli": ((1, 2), (3,), ("0", "1")),
}  # fmt: skip


def write_nine(data: Path) -> None:
    """GLUE's nine tasks under its own names of folders, files and columns, sixteen examples each, and test files."""
    for task, (folder, names, header, row, _) in GLUE.items():
        texts, labels, spelled = NINE[task]
        rows = []
        for number in range(16):
            own = {
                **dict.fromkeys(texts, f"{('bad', 'good')[number % 2]} film"),
                **dict.fromkeys(labels, spelled[number % 2]),
            }
            rows.append([own.get(place, cell) for place, cell in enumerate(row)])
        (data / folder).mkdir()
        for name in names:
            text = ["\t".join(one) for one in ([header] if header else []) + rows]
            (data / folder / f"{name}.tsv").write_text("\n".join(text) + "\n")
        columns = [header[place] if header else "sentence" for place in texts]
        test = [
            "\t".join(["index", *columns]),
            *("\t".join([str(n), *(rows[n][place] for place in texts)]) for n in range(5)),
        ]
        (data / folder / "test.tsv").write_text("\n".join(test) + "\n")


@pytest.mark.slow
def test_glue_from_its_own_files_to_its_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second seed of the third task it goes on there; then a submission from each model."""
    write_nine(tmp_path)
    model, own = write_tiny_bert(tmp_path / "model", layers=1), ["baseline=false"]
    learned: list[tuple[str, int]] = []
    original = training._train

    def train(config: FinetuneConfig, prepared: Prepared, seed: int, *rest: Any) -> Any:
        if len(learned) == 5 and not going_on:
            raise KeyboardInterrupt
        learned.append((config.task, seed))
        return original(config, prepared, seed, *rest)

    monkeypatch.setattr(training, "_train", train)
    going_on = False
    with pytest.raises(KeyboardInterrupt):
        suite.run(settings(tmp_path, model, tmp_path / "out", *own))
    going_on = True
    assert suite.run(settings(tmp_path, model, tmp_path / "out", *own)) == 0
    assert learned == [(task, seed) for task in SUITES["glue"] for seed in (1, 2)], "each once"
    table = (tmp_path / "out" / "results.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:] if line.startswith("| ")] == [
        *[*SUITES["glue"]][:6], "mnli, mismatched",
        *[*SUITES["glue"]][6:], "average",
    ]  # fmt: skip
    for task, (folder, *_) in GLUE.items():
        written = tmp_path / f"{folder}.tsv"
        given = [f"in={tmp_path}/{folder}/test.tsv", f"out={written}", "format=glue"]
        assert predict.main([f"model={tmp_path}/out/{task}-pretrained", *given]) == 0
        head, *rows = [line.split("\t") for line in written.read_text().splitlines()]
        assert head == ["index", "prediction"]
        assert [row[0] for row in rows] == ["0", "1", "2", "3", "4"]
        if task == "stsb":
            assert all(0 <= float(row[1]) <= 5 and re.fullmatch(r"\d\.\d{3}", row[1]) for row in rows)
        else:
            assert {row[1] for row in rows} <= {*NINE[task][2], *(("neutral",) if task == "mnli" else ())}
