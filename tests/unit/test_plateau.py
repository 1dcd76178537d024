"""The yardstick against a count by hand, and the verdicts on curves of healthy and of sick runs."""

from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest

from cloze.corpus.manifest import VAL, read_manifest
from cloze.corpus.shards import Split
from pretrain.evaluate.baseline import Baseline, held_out_baseline
from pretrain.evaluate.plateau import Evaluation, judge
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


def states(*losses: float, every: int = 1_000_000) -> list[str]:
    evaluations = [Evaluation((i + 1) * every, loss) for i, loss in enumerate(losses)]
    verdicts = [judge(evaluations[: i + 1], BASELINE) for i in range(len(evaluations))]
    return [verdict.state for verdict in verdicts if verdict]


def test_verdicts() -> None:
    assert states(7.5, 6.2, 5.9, 5.2, 4.9) == ["early", "early", "plateau", "left", "left"]
    assert states(6.5, 6.1, 6.05, 6.02) == ["early", "early", "plateau", "plateau"]
    assert states(6.5, 5.5, 6.1, 6.1) == ["early", "left", "plateau", "plateau"]
    assert states(9.0, 9.0, 9.0) == ["early", "early", "diverged"]
    assert states(float("nan")) == ["diverged"]
    assert judge([], BASELINE) is None
    verdict = judge([Evaluation(2_000_000, 5.7), Evaluation(4_000_000, 5.0)], BASELINE)
    assert verdict is not None
    assert verdict.left_at_tokens == 2_000_000
    assert "off the plateau since 2.0M tokens" in verdict.line
    assert all("\n" not in str(judge([Evaluation(5_000_000, loss)], BASELINE)) for loss in (5.0, 6.2, 9.0))
