"""Sentences with a word left out: whole words of held-out samples, the same every time, and what a model guesses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cloze import cli
from cloze.corpus.tokenizer import load_tokenizer
from pretrain.config import TrainConfig
from pretrain.data.loader import IGNORED, TrainingCorpus, bounded
from pretrain.evaluate.gaps import open_gaps
from pretrain.telemetry.predictions import read_predictions
from tests.support import TINY, Trainer


def config(corpus: Path, *more: str) -> TrainConfig:
    return cli.compose("train", TrainConfig, [*TINY, "run=r", f"data.path={corpus}", *more])


def test_a_gap_is_a_masked_whole_word_in_its_own_sentence(corpus: Path, tmp_path: Path) -> None:
    opened, tokenizer = TrainingCorpus(corpus), load_tokenizer(corpus / "tokenizer").backend
    found = open_gaps(config(corpus, "eval.predictions=20"), opened, tmp_path)
    assert found
    assert 5 < len(found.gaps) <= 20
    again = open_gaps(config(corpus, "eval.predictions=20", "micro_batch_size=2"), opened, tmp_path)
    assert again
    assert again.gaps == found.gaps, "however many are run at once"
    (split,) = [split for split, count in opened.held_out.items() if count]
    batch = bounded(opened.val_batch(np.arange(opened.held_out[split], dtype=np.int64), split))
    answers = {tokenizer.id_to_token(label) for label in batch.mlm_labels_M.tolist() if label != IGNORED}
    for gap in found.gaps:
        assert gap.answer in answers
        assert not gap.answer.startswith("##")
        assert "[" not in gap.before + gap.after
    assert open_gaps(config(corpus, "eval.predictions=0"), opened, tmp_path) is None


def test_its_guess_is_the_likeliest_token(corpus: Path, tmp_path: Path) -> None:
    """A model that always knows fills in every answer."""
    found = open_gaps(config(corpus), TrainingCorpus(corpus), tmp_path)
    assert found

    class Knows:
        def evaluate(self, batch: object) -> tuple[torch.Tensor, None]:
            labels = batch.mlm_labels_M.clamp(min=0)  # type: ignore[attr-defined]
            return torch.nn.functional.one_hot(labels, 200).float() * 50, None

    class Alone:
        device, is_main = torch.device("cpu"), True

    for step in (10, 20, 10):
        found.evaluate(Knows(), Alone(), step)  # type: ignore[arg-type]
    told = read_predictions(tmp_path)
    assert told.gaps == list(found.gaps)
    ((step, guesses),) = told.guesses
    assert step == 10
    assert [guess.token for guess in guesses] == [gap.answer for gap in found.gaps]
    assert guesses[0].probability == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(3, 2)])
def test_a_run_writes_them_and_ends_with_what_is_next(trainer: Trainer, corpus: Path, stage: int, ranks: int) -> None:
    result = trainer.run(f"data.path={corpus}", f"zero={stage}", "steps=4", "eval.every=2", ranks=ranks)
    assert set(result.codes) == {0}
    assert [step for step, _ in read_predictions(result.run).guesses] == [2, 4]
    last = result.stderr.splitlines()[-1]
    assert last == (
        f"{result.run}: finished; step 4 of 4 is saved in {result.run / 'checkpoints'}; "
        f"next: python -m pretrain.export {result.run} out/run"
    )
