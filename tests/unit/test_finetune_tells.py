"""What a fine-tuning tells beside its score, what it holds out, and that it goes on where it was killed."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from cloze.errors import Stopped, UserError
from finetune import grid, resume
from finetune import train as training
from finetune.__main__ import finetune
from finetune.__main__ import run as command
from finetune.config import FinetuneConfig
from finetune.data import both_sets
from finetune.families import TASKS, classification
from finetune.readers import Row
from finetune.tasks import Prepared
from finetune.train import TaskTrainer, run
from finetune.verdict import unk_share, verdict
from tests.support import ROOT
from tests.unit.tiny_bert import config, write_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 8), ("dev", 2), ("test", 1)):
        rows = ["good film\tx", "bad film\ty"] * count
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return tmp_path


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


# Beside the score


def test_a_verdict_by_hand() -> None:
    scores, guessing = {"accuracy": 0.5}, {"accuracy": 0.5}
    told = "answers 'x' to everything: accuracy 0.5000, guessing the commonest gives 0.5000"
    assert verdict(["x"] * 4, scores, guessing, "accuracy") == told
    told = "is no better than guessing: accuracy 0.5000, guessing the commonest gives 0.5000"
    assert verdict(["x", "y"], scores, guessing, "accuracy") == told
    assert verdict(["x", "y"], {"accuracy": 0.6}, guessing, "accuracy") is None
    assert verdict([["O", "O"], ["O"]], {"f1": 0.0}, {"f1": 0.0}, "f1") is not None
    assert str(verdict([0.5, 0.5], {"pearson": 0.1}, {"pearson": 0.0}, "pearson")).startswith("answers 0.5 to every")
    assert verdict(["x"], {"f1": 1.0}, {"f1": 0.0}, "f1") is None, "of one example nothing can be said"


def test_the_share_of_unknown_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer("good film zzz"), tokenizer("zzz bad a the")]  # 2 of 7
    assert unk_share(texts, tokenizer) == pytest.approx(2 / 7)
    assert unk_share([tokenizer("")], tokenizer) == 0


def test_a_model_that_answers_one_label_is_told_of(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the console and in metrics.json, beside what guessing gives and the share of [UNK]."""
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + "good film\tx\nbad zzz\ty\nzzz zzz\ty\n" * 2)

    def prepare(config: FinetuneConfig) -> Prepared:
        found = classification.prepare(config)
        return replace(found, dev=replace(found.dev, decide=lambda logits, model: ["y"] * 6))

    settings = config(folder, model, "epochs=1", "num_seeds=2")
    run(settings, prepare)
    wrong = "answers 'y' to everything: accuracy 0.6667, guessing the commonest gives 0.6667"
    told = capsys.readouterr().err
    assert f"warning: seed 1: the model {wrong}; more epochs" in told
    assert "warning: data.dev: 50% of the tokens are [UNK]: the model cannot read them" in told
    assert "optim.lr=0.003: as given" in told
    body = metrics(folder / "out")
    assert body["verdicts"] == {"1": wrong, "2": wrong}
    assert body["unk_share"] == {"train": 0.0, "dev": 0.5}
    expected = {"accuracy": 2 / 3, "macro_f1": 0.4, "matthews": 0.0, "f1": 0.8}
    assert body["guessing"] == pytest.approx(expected) == {name: body[name] for name in expected}


@pytest.mark.parametrize(
    ("task", "name", "text", "guessing"),
    [
        ("stsb", "tsv", "sentence1\tsentence2\tscore\na\tb\t1\na\tb\t3\n", {"pearson": 0, "spearman": 0, "mse": 1}),
        ("ner", "conll", "ann B-P\nwas O\nin O\n\n", {"precision": 0, "recall": 0, "f1": 0, "accuracy": 2 / 3}),
        (
            "squad",
            "jsonl",
            '{"question": "who", "context": "ann was", "answers": []}\n'
            '{"question": "who", "context": "ann was", "answers": [{"text": "ann", "answer_start": 0}]}\n',
            {"exact_match": 0.5, "f1": 0.5},
        ),
        (
            "summarization",
            "jsonl",
            '{"sentences": ["ann was", "bob met", "a film"], "summary": "ann was"}\n',
            {"rouge1": 1, "rouge2": 1, "rougeL": 1, "lead_rougeL": 1},
        ),
    ],
)
def test_what_guessing_gives_in_every_family(
    task: str, name: str, text: str, guessing: dict[str, float], tmp_path: Path, model: Path
) -> None:
    for part in ("train", "dev"):
        (tmp_path / f"{part}.{name}").write_text(text)
    own = ["max_len=32", "stride=4", "top_sentences=1"]
    settings = config(tmp_path, model, f"task={task}", *own, suffix=name)
    dev = settings.definition.family.prepare(settings).dev
    assert dev.score(dev.guess) == pytest.approx(guessing)
    assert len(dev.shown) == len(dev.guess)
    json.dumps([*dev.shown])


# Sets


def held_out(folder: Path, rows: Sequence[str], *overrides: str) -> tuple[list[str], list[str]]:
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    settings = config(folder, folder, "data.dev=null", *overrides)
    train, dev = ([row.columns["sentence"] for row in part.rows] for part in both_sets(settings))
    return train, dev


def test_a_share_of_the_training_data_is_held_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same in every run, about the share that is asked for; a text stands on one side whatever its label, and
    rows that come later move none."""
    rows = [f"film {number}\t{number % 2}" for number in range(1000)]
    train, dev = held_out(folder, rows)
    told = (
        f"data.dev: none is given: {len(dev)} of 1000 rows of data.train are held out, by hash of their text (data.dev_"
    )
    assert told in capsys.readouterr().err
    assert 70 < len(dev) < 130
    assert sorted(train + dev) == sorted(f"film {number}" for number in range(1000))
    assert (train, dev) == held_out(folder, rows)
    again = held_out(folder, [*rows, *(f"film {number}\tother" for number in range(1000)), "more\t1"])
    assert {*again[1]} - {"more"} == {*dev}
    assert not {*again[0]} & {*again[1]}
    assert 400 < len(held_out(folder, rows, "data.dev_fraction=0.5")[1]) < 600
    with pytest.raises(UserError, match=r"train\.tsv: its 2 rows are too few to hold out 0\.1%; name data\.dev, or"):
        held_out(folder, rows[:2], "data.dev_fraction=0.001")
    with pytest.raises(UserError, match=r"data\.dev_fraction=1\.0: must be in"):
        held_out(folder, rows, "data.dev_fraction=1")


def test_questions_of_one_context_stay_together(tmp_path: Path) -> None:
    rows = [{"question": f"who {i}", "context": f"ann {i % 20}", "answers": []} for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = config(tmp_path, tmp_path, "task=squad", "data.dev=null", "data.dev_fraction=0.5", suffix="jsonl")
    train, dev = ({row.columns["context"] for row in part.rows} for part in both_sets(settings))
    assert train
    assert dev
    assert not train & dev


def test_a_label_that_only_the_held_out_part_has_is_named(folder: Path, model: Path) -> None:
    rows = [f"{'good ' * n}film\t{'xy'[n % 2]}" for n in range(20)]
    _, dev = held_out(folder, rows)
    rare = [row if row.split("\t")[0] not in dev else row.split("\t")[0] + "\trare" for row in rows]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rare]))
    with pytest.raises(UserError, match=r"data\.dev, cut from data\.train=.*: line \d+: label 'rare' is not in"):
        finetune(config(folder, model, "data.dev=null"))


def test_a_test_set_is_scored_and_its_answers_are_written(folder: Path, model: Path) -> None:
    (folder / "test.tsv").write_text("sentence\tlabel\ngood film\tx\nbad film\ty\ngood film\ty\n")
    result = finetune(config(folder, model, "epochs=9", f"data.test={folder}/test.tsv"))
    assert result["accuracy"] == 1
    assert result["test_accuracy"] == pytest.approx(2 / 3)
    rows = [json.loads(line) for line in (folder / "out" / "test-predictions.jsonl").read_text().splitlines()]
    assert rows[0] == {"sentence": "good film", "label": "x", "predicted": "x"}
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == result["test_accuracy"]
    assert metrics(folder / "out")["guessing"]["test_accuracy"] == pytest.approx(2 / 3)
    (folder / "test.tsv").write_text("sentence\tlabel\ngood film\tz\n")
    with pytest.raises(UserError, match=r"data\.test=.*test\.tsv: line 2: label 'z' is not in data\.train"):
        finetune(config(folder, model, f"data.test={folder}/test.tsv", f"out={folder}/b"))


# Going on


def interrupt_seed(monkeypatch: pytest.MonkeyPatch, seed: int | None) -> list[int]:
    """Ctrl-C when so a seed is to be trained; returns the seeds that are."""
    trained: list[int] = []
    original = training._train

    def train(config: FinetuneConfig, prepared: Prepared, own: int, checkpoints: Path, *rest: Any) -> Any:
        if own == seed:
            checkpoints.mkdir(exist_ok=True)
            raise KeyboardInterrupt
        trained.append(own)
        return original(config, prepared, own, checkpoints, *rest)

    monkeypatch.setattr(training, "_train", train)
    return trained


@pytest.mark.slow
def test_killed_in_the_third_seed_it_goes_on_there(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["epochs=1", "num_seeds=3"]
    finetune(config(folder, model, *own, f"out={folder}/whole"))
    with monkeypatch.context() as patch:
        interrupt_seed(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(folder, model, *own))
    unfinished = folder / ".out.unfinished"
    assert not (folder / "out").exists()
    assert sorted(path.name for path in unfinished.iterdir())[:2] == [".cloze.json", ".lock"]
    for other, key in (("optim.lr=1e-3", "optim.lr"), ("seed=2", "seed"), ("num_seeds=2", "num_seeds")):
        with pytest.raises(UserError, match=rf"\.out\.unfinished has seeds that were learned with another {key}; remo"):
            finetune(config(folder, model, *own, other))
    with monkeypatch.context() as patch:
        trained = interrupt_seed(patch, None)
        finetune(config(folder, model, *own))
    assert trained == [3]
    assert not unfinished.exists()
    bodies = [metrics(folder / name) for name in ("out", "whole")]
    assert bodies[0].pop("config") != bodies[1].pop("config")
    assert bodies[0] == bodies[1]
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    capsys.readouterr()
    trained = interrupt_seed(monkeypatch, None)
    assert command(config(folder, model, *own)) == 0, "finished: nothing is learned again"
    assert trained == []
    told = capsys.readouterr()
    assert f"out={folder}/out: is finished with these settings; remove it to learn anew" in told.err
    assert f"accuracy {bodies[0]['accuracy']:.4f}" in told.out
    with pytest.raises(UserError, match=r"out=.*: was made with another epochs, optim\.lr; remove it, or name another"):
        finetune(config(folder, model, "num_seeds=3", "epochs=2", "optim.lr=1e-3"))
    (folder / "dev.tsv").write_text("sentence\tlabel\ngood\tx\nbad\ty\n")
    with pytest.raises(UserError, match=r"out=.*: was made with another data\.dev; remove it"):
        finetune(config(folder, model, *own))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "last"),
    [
        (["dropout=0.3"], 2),  # in the middle of an epoch
        (["dropout=0.3", "head_epochs=1"], 2),  # the head has learned, and does not again
        (["patience=3", "distill.hidden=1", "distill.teacher=wide"], 1),  # at the end of one; a projection learns, too
    ],
)
def test_killed_within_a_seed_it_goes_on_there(
    folder: Path, model: Path, own: list[str], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same weights and scores to the bit; what is torn does not count, and nothing is left."""
    if "distill.hidden=1" in own:
        finetune(
            config(folder, write_tiny_bert(folder / "bert", layers=1, hidden=48), "epochs=1", f"out={folder}/wide")
        )
        monkeypatch.chdir(folder)
    own = [*own, "epochs=2", "batch_size=4"]
    finetune(config(folder, model, *own, f"out={folder}/whole"))
    seal, sealed = resume.seal, []

    def killed(checkpoint: Path) -> None:
        if len(sealed) == last:
            raise KeyboardInterrupt
        sealed.append(checkpoint.name)
        seal(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "seal", killed)
        patch.setattr(training, "_CHECKPOINT_SECONDS", 0.0 if "dropout=0.3" in own else 300.0)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(folder, model, *own))
    steps: list[int] = []
    original = TaskTrainer.training_step

    def step(self: TaskTrainer, *rest: Any) -> Any:
        steps.append(self.state.global_step)
        return original(self, *rest)

    monkeypatch.setattr(TaskTrainer, "training_step", step)
    finetune(config(folder, model, *own))
    assert steps == list(range(int(sealed[-1].removeprefix("checkpoint-")), 8))
    bodies = [metrics(folder / name) for name in ("out", "whole")]
    assert bodies[0].pop("config") != bodies[1].pop("config")
    for body in bodies:
        body.pop("distilled", None)  # has seconds
    assert bodies[0] == bodies[1]
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    assert not (folder / ".out.unfinished").exists()


def test_ctrl_c_stops_with_a_checkpoint_and_the_line_says_so(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal in the second step: that is finished and saved, and the same command goes on behind it."""
    own = config(folder, model, "epochs=2", "batch_size=4")
    steps: list[int] = []
    original = TaskTrainer.training_step

    def step(self: TaskTrainer, *rest: Any) -> Any:
        steps.append(self.state.global_step)
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *rest)

    monkeypatch.setattr(TaskTrainer, "training_step", step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"^out=.*: interrupted; seed 1 saved at step 2; the same command goes on there$"):
        command(own)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step, with a checkpoint; another Ctrl-C stops at once" in capsys.readouterr().err
    assert command(own) == 0
    assert steps == [*range(2), *range(2, 8)]
    assert "report.html shows what it gets wrong; next: python -m finetune.predict" in capsys.readouterr().err
    assert resume.standing(str(folder / "other")).endswith("the same command begins anew")


def test_nothing_of_a_first_seed_stays(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.rglob("*"))
    interrupt_seed(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(folder, model))
    assert sorted(folder.rglob("*")) == before


def test_what_is_not_ours_is_left_alone(folder: Path, model: Path) -> None:
    (folder / ".out.unfinished").mkdir()
    (folder / ".out.unfinished" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.unfinished is there, and not ours; name another out"):
        finetune(config(folder, model, "epochs=1"))
    assert (folder / ".out.unfinished" / "thesis.txt").read_text() == "mine"


def test_one_process_at_a_time(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training._train

    def train(settings: FinetuneConfig, *rest: Any) -> Any:
        with pytest.raises(UserError, match=r"out=.*: another process learns it; wait for it"):
            run(settings)
        return original(settings, *rest)

    monkeypatch.setattr(training, "_train", train)
    assert finetune(config(folder, model, "epochs=1"))


def test_rows_without_their_text_are_cut_somewhere(tmp_path: Path) -> None:
    """Where the columns are wrong the reader says so, not the cut."""
    assert classification._texts(Row("line 1", {"x": 1}), config(tmp_path, tmp_path).columns) == []


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on(folder: Path, model: Path) -> None:
    """SIGKILL, which nobody can catch, in the second of three seeds."""
    rows = ["good film\tx", "bad film\ty"] * 2000
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    files = [f"data.{name}={folder}/{name}.tsv" for name in ("train", "dev")]
    own = [f"model={model}", *files, f"out={folder}/out", "num_seeds=3", "epochs=1", "max_len=16"]
    command = [sys.executable, "-m", "finetune", *own]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    mark, end = folder / ".out.unfinished" / ".cloze.json", time.monotonic() + 200
    while time.monotonic() < end and not (mark.is_file() and json.loads(mark.read_text())["seeds"]):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "seed 1  is learned already" in done.stderr
    assert "seed 3  is learned already" not in done.stderr
    assert sorted(metrics(folder / "out")["by_seed"]) == ["1", "2", "3"]


# Cards and tables


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("task", "name", "text", "own", "answer"),
    [
        ("sst2", "tsv", "sentence\tlabel\ngood film\t0\nbad film\t1\n", (), r"(positive|negative) 0\.\d+"),
        ("stsb", "tsv", "sentence1\tsentence2\tscore\na\tb\t1\na\tb\t3\n", (), r"-?\d+\.\d+"),
        ("ner", "conll", "ann B-P\nwas O\nin O\n\n", ("head=crf",), r"\[\('Ann', '(B-P|O)'\), .*\('Rome', .*\)\]"),
        (
            "squad",
            "jsonl",
            '{"question": "who", "context": "ann was", "answers": [{"text": "ann", "answer_start": 0}]}\n',
            (),
            ".*",
        ),
        (
            "summarization",
            "jsonl",
            '{"sentences": ["ann", "bob"], "summary": "ann"}\n',
            (),
            r"\[\(.*'The (first|sec).*",
        ),
    ],
)
def test_the_code_of_a_card_runs(
    task: str,
    name: str,
    text: str,
    own: tuple[str, ...],
    answer: str,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for part in ("train", "dev"):
        (tmp_path / f"{part}.{name}").write_text(text)
    more = ["max_len=32", "stride=4", "top_sentences=1", "epochs=1", *own]
    finetune(config(tmp_path, model, f"task={task}", *more, suffix=name))
    card = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code_of(card), "README.md", "exec"), {})
    assert re.fullmatch(answer + r"\n", capsys.readouterr().out)
    assert f"pipeline_tag: {TASKS[task].family.tag}" in card


def test_a_card_tells_scores_data_and_what_was_set(folder: Path, model: Path) -> None:
    own = ["epochs=2", "num_seeds=2", f"data.test={folder}/test.tsv", "loss.balanced=true"]
    finetune(config(folder, model, *own))
    card, body = (folder / "out" / "README.md").read_text(), metrics(folder / "out")
    best = body["by_seed"][str(body["model_of_seed"])]
    runs = [100 * run["test_accuracy"] for run in body["by_seed"].values()]
    error = statistics.stdev(runs) / 2**0.5
    spread = f"{statistics.median(runs):.1f} ({statistics.fmean(runs):.1f} ± {error:.1f})"
    assert f"| test_accuracy | {100 * best['test_accuracy']:.1f} | {spread} | 50.0 |" in card
    assert f"that of seed {body['model_of_seed']}, the best by accuracy on the development set" in card
    assert "| test | test.tsv, 2 examples | 0.0% |" in card
    assert "| train | train.tsv, 16 examples | 0.0% |" in card
    assert "Labels: `x`, `y`." in card
    for key, value in (("optim.lr", 0.003), ("batch_size", 8), ("epochs", 2), ("loss.balanced", True)):
        assert f"| `{key}` | {value} |" in card
    assert "weight_decay" not in card, "a default"
    assert str(folder) not in card
    for seed, wrong in body.get("verdicts", {}).items():
        assert f"**Seed {seed}: the model {wrong}.**" in card


def test_a_grid_is_a_table(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what varies; the best median first."""
    for lr, epochs in ((1e-9, 1), (3e-3, 9)):
        own = [f"optim.lr={lr}", f"epochs={epochs}", "num_seeds=2", f"data.test={folder}/test.tsv"]
        finetune(config(folder, model, *own, f"out={folder}/grid/lr-{lr}"))
    assert grid.main([str(folder / "grid")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | epochs | optim.lr | accuracy, % | test_accuracy, % |"
    assert lines[2] == "| lr-0.003 | 9 | 0.003 | 100.0 (100.0 ± 0.0) | 100.0 (100.0 ± 0.0) |"
    assert lines[3].startswith("| lr-1e-09 | 1 | 1e-09 | 50.0 ")
    told = "Scores: median of 2 seeds, in brackets mean and standard error; guessing the commonest answer gives 50.0."
    assert lines[-1] == told
    assert grid.main([str(model)]) == 64
    assert "holds no model that `python -m finetune` wrote" in capsys.readouterr().err
    body = metrics(folder / "grid" / "lr-0.003")
    body["config"]["task"] = "rte"
    with pytest.raises(UserError, match=r"several tasks \(classification, rte\)"):
        grid.markdown({**grid.found([folder / "grid"]), folder: body})


# Trackers


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_trackers_get_losses_and_scores_of_every_seed(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's events read back; W&B (a stand-in) is one run although the second seed was killed first."""
    runs: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    ends: list[int] = []

    class Run:
        dir = url = "x"

        def log(self, row: dict[str, Any]) -> None:
            rows.append(row)

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def alert(self, **_: Any) -> None: ...

        def finish(self, exit_code: int) -> None:
            ends.append(exit_code)

    def init(**given: Any) -> Run:
        runs.append(given)
        return Run()

    fake = SimpleNamespace(init=init, Settings=lambda **_: None, termsetup=lambda *_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    own = ["epochs=2", "num_seeds=2", "log.tensorboard=true", "wandb.mode=offline", "wandb.tags=[a]"]
    with monkeypatch.context() as patch:
        interrupt_seed(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            finetune(config(folder, model, *own))
    finetune(config(folder, model, *own, "wandb.project=other"))
    assert ends == [75, 0]
    assert [run["id"] for run in runs] == [runs[0]["id"]] * 2
    assert [run["name"] for run in runs] == ["out"] * 2
    assert runs[0]["config"]["optim"]["lr"] == 3e-3
    body, drawn = metrics(folder / "out"), board(folder / "out" / "tensorboard")
    for seed in (1, 2):
        accuracy = body["by_seed"][str(seed)]["accuracy"]
        assert drawn[f"seed-{seed}/accuracy"] == [(4, pytest.approx(accuracy))]
        assert [step for step, _ in drawn[f"seed-{seed}/loss"]] == [1, 2, 3, 4]
        assert [row["step"] for row in rows if f"seed-{seed}/loss" in row] == [1, 2, 3, 4]
    assert (folder / "out" / "README.md").is_file()
    assert not (folder / ".out.unfinished").exists()


def test_a_tracker_that_is_not_installed(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard that is asked for and not there is refused; W&B does no harm."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    finetune(config(folder, model, "epochs=1", "wandb.mode=auto"))
    told = "W&B: off for this run: not installed (pip install 'cloze[wandb]'); metrics.json will have the scores"
    assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"log\.tensorboard=true: tensorboard is not installed"):
        finetune(config(folder, model, "log.tensorboard=true", f"out={folder}/b"))
