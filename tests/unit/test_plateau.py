"""The yardstick against a count by hand, and the verdicts on curves of healthy and of sick runs."""

from collections import Counter
from math import isnan, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cloze.corpus.manifest import VAL, read_manifest
from cloze.corpus.shards import Split
from pretrain.evaluate.baseline import Baseline, held_out_baseline
from pretrain.evaluate.doctor import Doctor
from pretrain.evaluate.plateau import Evaluation, evaluations_of, judge
from pretrain.session import baseline_of
from tests.support import make_corpus

BASELINE = Baseline(mlm_loss=6.4, mlm_accuracy=0.06, nsp_accuracy=0.6)


@pytest.mark.parametrize("baked_draws", [0, 1])
def test_the_baseline_is_a_count(tmp_path: Path, baked_draws: int) -> None:
    make_corpus(tmp_path / "c", baked_draws=baked_draws)
    manifest = read_manifest(tmp_path / "c")
    split = Split(tmp_path / "c", manifest, VAL)
    counts: Counter[int] = Counter()
    labels = []
    for index in range(len(split)):
        sample = split.gather(np.asarray([index]), 0)
        drawn = sample.tokens_T, sample.lengths_Nx2, sample.ids_N, 0, sample.word_starts_T
        masks = sample.masks or manifest.draw(*drawn)
        counts.update(sample.tokens_T[masks.positions_M].tolist())
        labels += sample.random_next_N.tolist()
    total = counts.total()
    found = held_out_baseline(tmp_path / "c", 0)
    assert found is not None
    assert found.mlm_loss == pytest.approx(-sum(n / total * log(n / total) for n in counts.values()))
    assert found.mlm_accuracy == pytest.approx(max(counts.values()) / total)
    assert found.nsp_accuracy == pytest.approx(max(sum(labels), len(labels) - sum(labels)) / len(labels))


def test_few_evaluated_samples_are_held_against_the_frequencies_of_many(tmp_path: Path) -> None:
    make_corpus(tmp_path / "c")
    corpus: Any = SimpleNamespace(corpora=[SimpleNamespace(directory=tmp_path / "c")])
    config: Any = SimpleNamespace(eval=SimpleNamespace(max_samples=1))
    assert baseline_of(corpus, config) == held_out_baseline(tmp_path / "c", 0) != held_out_baseline(tmp_path / "c", 1)


def states(*losses: float, every: int = 1_000_000) -> list[str]:
    evaluations = [Evaluation((i + 1) * every, loss) for i, loss in enumerate(losses)]
    verdicts = [judge(evaluations[: i + 1], BASELINE) for i in range(len(evaluations))]
    return [verdict.state for verdict in verdicts if verdict]


def test_verdicts() -> None:
    assert states(7.5, 6.2, 5.9, 5.2, 4.9) == ["early", "early", "plateau", "left", "left"]
    assert states(6.5, 6.1, 6.05, 6.02) == ["early", "early", "plateau", "plateau"]
    assert states(6.5, 5.5, 6.1, 6.1) == ["early", "left", "plateau", "plateau"]
    assert states(9.0, 9.0, 9.0) == ["early", "diverged", "diverged"]
    assert states(9.0, every=4_000_000) == ["diverged"]
    assert states(float("nan")) == ["diverged"]
    assert judge([], BASELINE) is None
    verdict = judge([Evaluation(2_000_000, 5.7), Evaluation(4_000_000, 5.0)], BASELINE)
    assert verdict is not None
    assert verdict.left_at_tokens == 2_000_000
    assert "off the plateau since 2.0M tokens" in verdict.line
    assert all("\n" not in str(judge([Evaluation(5_000_000, loss)], BASELINE)) for loss in (5.0, 6.2, 9.0))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # (held out, training) every 0.5 million tokens
        pytest.param([(6.9, 6.8), (6.71, 6.7), (6.7, 6.68), (6.72, 6.7)], "early slow trapped trapped", id="trap"),
        pytest.param([(8.5, 8.7), (7.9, 8.1), (7.3, 7.5), (6.9, 7.0)], "early slow slow slow", id="too slow"),
        pytest.param([(8.5, 8.7), (6.6, 6.7), (6.1, 6.2), (5.6, 5.7)], "early slow early left", id="healthy"),
        pytest.param([(6.6, 6.1), (6.6, 5.6), (6.6, 5.4), (6.5, 5.2)], "early early early early", id="far bias"),
        pytest.param([(6.6, 6.5), (7.2, 7.2), (7.5, 7.5)], "early diverged diverged", id="rises"),
        pytest.param([(40.0, 40.0), (30.0, 29.0)], "diverged diverged", id="worse than blind"),
        pytest.param([(3.0, 3.0), (0.9, 0.8), (0.5, 0.5)], "left easy easy", id="held out is known"),
        pytest.param([(7.0, 3.0), (8.0, 0.2)], "unlike unlike", id="seen in training"),
        pytest.param([(5.0, None), (6.41, None), (6.41, None)], "left trapped trapped", id="without training"),
    ],
)
def test_kinds_of_sickness(curve: list[tuple[float, float | None]], expected: str) -> None:
    evaluations = [Evaluation(500_000 * (i + 1), *losses) for i, losses in enumerate(curve)]
    verdicts = [judge(evaluations[: i + 1], BASELINE) for i in range(len(evaluations))]
    assert [verdict.state for verdict in verdicts if verdict] == expected.split()
    assert [verdict.is_trouble for verdict in verdicts if verdict] == [
        state not in ("early", "left") for state in expected.split()
    ]
    assert all("\n" not in verdict.line for verdict in verdicts if verdict)


def test_evaluations_come_with_the_training_loss_before_them() -> None:
    rows: list[dict[str, Any]] = [
        {"eval/mlm_loss": 9.0, "tokens": 0},
        {"train/mlm_loss": 7.0, "tokens": 10},
        {"train/mlm_loss": 6.5, "tokens": 20},
        {"eval/mlm_loss": 6.6, "tokens": 20},
        {"train/mlm_loss": None, "tokens": 30},
        {"eval/mlm_loss": None, "tokens": 30.0},
        {"eval/mlm_loss": 6.5},
    ]
    found = evaluations_of(rows)
    assert found[:2] == [Evaluation(0, 9.0, None), Evaluation(20, 6.6, 6.5)]
    assert (found[2].tokens, found[2].train_loss, isnan(found[2].mlm_loss), len(found)) == (30, None, True, 3)


def test_the_doctor_speaks_when_the_state_turns_and_goes_on_after_a_resume() -> None:
    doctor = Doctor(BASELINE)
    lines = []
    for tokens, loss in ((1_000_000, 7.0), (4_000_000, 6.1), (5_000_000, 6.0), (6_000_000, 5.5), (7_000_000, 5.2)):
        metrics, line = doctor.examine({"eval/mlm_loss": loss, "eval/nsp_accuracy": 0.6}, tokens)
        lines.append((line or "").partition(":")[0])
        assert metrics["eval/frequencies_loss"] == BASELINE.mlm_loss
        assert metrics["eval/majority_nsp_accuracy"] == BASELINE.nsp_accuracy
        assert metrics.get("eval/left_plateau_tokens") == (6_000_000 if tokens >= 6_000_000 else None)
    assert lines == ["", "on the plateau", "", "off the plateau since 6.0M tokens", ""]

    earlier = [{"step": 1, "tokens": 6_000_000, "eval/mlm_loss": 5.5}, {"step": 2, "train/loss": 5.4}]
    metrics, line = Doctor(BASELINE, earlier).examine({"eval/mlm_loss": 5.2}, 8_000_000)
    assert line is None
    assert metrics["eval/left_plateau_tokens"] == 6_000_000
    assert "eval/majority_nsp_accuracy" not in metrics
    assert Doctor(None).examine({"eval/mlm_loss": 5.2}, 1) == ({}, None)
    assert Doctor(BASELINE).examine({}, 1) == ({}, None)
