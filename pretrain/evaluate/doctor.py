"""The plateau doctor of a run: holds every held-out evaluation against what guessing reaches, and says when that turns.

Knows the baseline of the corpus and the run's earlier evaluations; knows neither model nor trackers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pretrain.evaluate.baseline import Baseline
from pretrain.evaluate.plateau import Evaluation, evaluations_of, judge


class Doctor:
    """Of one run, over all of its starts. Without a baseline (no held-out samples) it has nothing to say."""

    def __init__(self, baseline: Baseline | None, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """`earlier` are rows of metrics.jsonl, in order: those that hold an evaluation count."""
        self._baseline = baseline
        self._evaluations = evaluations_of(earlier)
        verdict = judge(self._evaluations, baseline) if baseline else None
        self._state = verdict.state if verdict else ""

    def change_corpus(self, baseline: Baseline | None) -> None:
        """Hold what follows against another corpus' guessing."""
        self._baseline = baseline

    def examine(
        self, metrics: Mapping[str, float], tokens: int, train_loss: float | None = None
    ) -> tuple[dict[str, float], str | None]:
        """Metrics to log beside an evaluation's, and a line to say where the state of the run turns, else None.

        `train_loss` is the masked-LM loss in training, of the last line of metrics.
        `eval/frequencies_loss` is what word frequencies alone give, `eval/majority_nsp_accuracy` what the more frequent
        label does; `eval/left_plateau_tokens` stands there once the plateau is left.
        """
        if self._baseline is None or "eval/mlm_loss" not in metrics:
            return {}, None
        self._evaluations.append(Evaluation(tokens, metrics["eval/mlm_loss"], train_loss))
        verdict = judge(self._evaluations, self._baseline)
        assert verdict
        found = {"eval/frequencies_loss": self._baseline.mlm_loss}
        if "eval/nsp_accuracy" in metrics:
            found["eval/majority_nsp_accuracy"] = self._baseline.nsp_accuracy
        if verdict.left_at_tokens is not None:
            found["eval/left_plateau_tokens"] = float(verdict.left_at_tokens)
        turned, self._state = verdict.state != self._state, verdict.state
        return found, verdict.line if turned and verdict.state != "early" else None
