"""The demo's own arithmetic and its verdicts; `make demo` itself runs in CI."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizer

from cloze import cli
from cloze.corpus.manifest import VAL, read_manifest
from cloze.corpus.shards import Split
from cloze.errors import TrainingError, UserError
from launch import demo
from launch.demo import ON_CPU, ON_GPU, Demo, Paths, last_evaluation, run_child
from launch.demo_screen import draw_curve, fill_masks, nearest_words
from pretrain.config import TrainConfig
from pretrain.evaluate.baseline import Baseline, held_out_baseline


@pytest.mark.parametrize("max_samples", [0, 10, 10_000])
def test_guessing_baseline_is_the_best_constant_guess(corpus: Path, max_samples: int) -> None:
    """Counted sample by sample; any other constant distribution has a higher loss."""
    manifest = read_manifest(corpus)
    split = Split(corpus, manifest, VAL)
    masked: list[int] = []
    labels: list[int] = []
    for index in range(min(len(split), max_samples or len(split))):
        sample = split.gather(np.asarray([index]), 0)
        assert sample.masks is not None
        masked += [int(sample.tokens_T[position]) for position in sample.masks.positions_M]
        labels.append(int(sample.random_next_N[0]))
    counts = Counter(masked)
    found = held_out_baseline(corpus, max_samples)
    best = -sum(count / len(masked) * math.log(count / len(masked)) for count in counts.values())
    assert found.mlm_loss == pytest.approx(best)
    assert found.mlm_accuracy == pytest.approx(max(counts.values()) / len(masked))
    assert found.nsp_accuracy == pytest.approx(max(Counter(labels).values()) / len(labels))
    smoothed = -sum(count / len(masked) * math.log((count + 1) / (len(masked) + 61)) for count in counts.values())
    assert found.mlm_loss < smoothed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose bias alone decides: every [MASK] is "exception", then "value"."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "exception", "value"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    network = BertForPreTraining(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with torch.no_grad():
        network.cls.predictions.decoder.weight.zero_()
        network.cls.predictions.bias.copy_(torch.tensor([-20.0, -20, -20, -20, -20, -20, math.log(3), 0]))
    network.save_pretrained(folder)
    return folder


def test_fill_masks_names_words_and_probabilities(model: Path) -> None:
    filled = fill_masks(model, ["the [MASK] .", "[MASK] the the the value"])
    assert [[word for word, _ in one.trained][:2] for one in filled] == [["exception", "value"]] * 2
    assert filled[0].trained[0][1] == pytest.approx(0.75, abs=1e-6)
    assert filled[1].trained[1][1] == pytest.approx(0.25, abs=1e-6)
    assert len(filled[0].random) == 3
    assert all(probability < 0.3 for _, probability in filled[0].random), "fresh weights know nothing"


def test_nearest_words_stand_beside_those_of_random_weights(model: Path) -> None:
    (found,) = nearest_words(model, ["value", "unheard"])
    assert found.word == "value"
    assert {*found.trained} == {*found.random} == {"the", "exception"}


def test_the_curve_is_drawn_where_its_losses_are() -> None:
    rows = [{"tokens": 0, "train/mlm_loss": 9.0}, {"tokens": 2_000_000, "train/mlm_loss": 4.0, "eval/mlm_loss": 5.0}]
    lines = draw_curve([*rows, {"step": 3}], Baseline(6.5, 0.1, 0.5))
    assert lines[0] == "  9.0 |*"
    assert lines[9] == f"  4.0 |{'*':>61}"
    assert lines[7] == f"      |{'o':>61}"
    assert lines[4] == f"  6.5 |{'-' * 61} word frequencies alone"
    assert lines[-1].endswith("2.0M tokens")
    assert all(line.isascii() for line in lines)
    assert draw_curve([{"step": 3}], Baseline(6.5, 0.1, 0.5)) == []


def test_the_newest_evaluation_counts(tmp_path: Path) -> None:
    rows = [{"step": 1, "eval/mlm_loss": 5.0, "train/loss": 1}, {"step": 2, "eval/mlm_loss": 4.0}, {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_evaluation(tmp_path) == {"eval/mlm_loss": 4.0}
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="--fresh"):
        last_evaluation(tmp_path)


@pytest.mark.parametrize("plan", [ON_CPU, ON_GPU])
def test_the_plans_are_valid_configurations(plan: demo.Plan) -> None:
    config = cli.compose("train", TrainConfig, ["run=demo", "data.path=x", *plan.train])
    assert config.eval.every
    assert config.checkpoint.every < config.steps


@pytest.fixture
def finished(tmp_path: Path, corpus: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """A demo whose commands have all run."""
    paths = Paths(shards=corpus, run=tmp_path / "run", model=model)
    paths.run.mkdir()
    best = held_out_baseline(corpus, 0)
    evaluation = {
        "eval/mlm_loss": best.mlm_loss - 2, "eval/mlm_accuracy": 0.4, "eval/nsp_loss": 0.5,
        "eval/nsp_accuracy": best.nsp_accuracy + 0.2,
    }  # fmt: skip
    row = {"step": 9, "tokens": 10**6, "train/mlm_loss": 5.0, "throughput/tokens_per_second": 16_384.0}
    (paths.run / "metrics.jsonl").write_text(json.dumps(row | evaluation) + "\n")
    monkeypatch.setattr(demo, "run_child", lambda command: 0)
    monkeypatch.setattr(demo, "WORDS", ["value", "unheard"])
    return Demo(ON_CPU, ["eval.max_samples=0"], paths)


def test_a_good_run_ends_with_predictions_and_a_report(finished: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.run() == 0
    printed = capsys.readouterr().out
    report = finished._paths.run / "report.html"
    assert f"report  {report}\n" in printed
    assert "is prepared already" in printed
    assert "$ python -m pretrain.export" in printed
    assert printed.count("exception 75%, value 25%") == 5
    assert re.search(r"^value +(the|exception), (the|exception)    \[", printed, re.MULTILINE)
    assert "source.paths=[FOLDER/*.txt]" in printed
    assert "recipe=fast  # about 16 min 40 s here" in printed
    assert " word frequencies alone\n" in printed
    assert f"{held_out_baseline(finished._paths.shards, 0).mlm_loss:.3f}" in printed
    assert "exception 75%" in report.read_text()


@pytest.mark.parametrize("overrides", [(), ("steps=1200",), ("optim.lr=5e-3", "seed=3"), ("steps=1201",)])
@pytest.mark.parametrize(("name", "value"), [("mlm_loss", 4.0), ("mlm_loss", math.nan), ("nsp_accuracy", 0.52)])
def test_a_model_that_only_guesses_fails(finished: Demo, overrides: tuple[str, ...], name: str, value: float) -> None:
    reached = {"eval/mlm_loss": 2.0, "eval/nsp_accuracy": 0.9} | {f"eval/{name}": value}
    whole = Demo(ON_CPU, overrides, finished._paths)
    with pytest.raises(TrainingError, match="guessing") as caught:
        whole._passed(reached, Baseline(mlm_loss=4.1, mlm_accuracy=0.1, nsp_accuracy=0.5))
    assert caught.value.exit_code == 70


def test_a_demo_of_fewer_steps_is_told_what_it_has_not_learned(
    finished: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    short, guessing = Demo(ON_CPU, ["steps=300"], finished._paths), Baseline(4.1, 0.1, 0.5)
    assert short._passed({"eval/mlm_loss": 4.0, "eval/nsp_accuracy": 0.9}, guessing) == 0
    assert (
        "note: held-out MLM loss is not 1.5 nats below guessing; the demo without steps=300" in capsys.readouterr().out
    )
    assert short._passed({"eval/mlm_loss": 2.0, "eval/nsp_accuracy": 0.9}, guessing) == 0
    assert not capsys.readouterr().out
    with pytest.raises(TrainingError):
        short._passed({"eval/mlm_loss": math.nan, "eval/nsp_accuracy": 0.9}, guessing)


def test_a_failing_step_stops_with_its_code(
    finished: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str]) -> int:
        ran.append(command[2])
        return 75 if command[2] == "launch" else 0

    monkeypatch.setattr(demo, "run_child", run)
    assert finished.run() == 75
    assert ran == ["data_prep.verify", "launch"]
    assert "stopped: pretrain with DeepSpeed ZeRO-1: exit code 75" in capsys.readouterr().err


def test_a_child_gets_the_signals_and_the_time_to_end(tmp_path: Path) -> None:
    child = (
        "import signal, sys, time, pathlib; signal.signal(15, lambda *_: (time.sleep(1), sys.exit(75))); "
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    )
    ready = tmp_path / "ready"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from launch.demo import run_child; sys.exit(run_child([sys.executable, '-c', *sys.argv[1:]]))",
            child,
            str(ready),
        ]
    )
    while not ready.exists():
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)  # Ctrl-C comes to both: the child's to answer
    time.sleep(0.3)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 75
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
