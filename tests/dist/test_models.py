"""ModernBERT and compiled layers through the real training command, on two ranks."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pretrain.export.hugging_face import export
from tests.support import Trainer, make_corpus

MODERNBERT = (
    "model=modernbert_base", "model.num_layers=2", "model.num_heads=2", "model.hidden_size=32",
    "model.intermediate_size=48", "model.max_positions=64",
)  # fmt: skip
# Any backend traces and differentiates alike; this one needs no compiler.
WITHOUT_COMPILER = (
    "import pretrain.session; pretrain.session.require_compiler = lambda *_: None; "
    "from pretrain.model.bert import PackedBert; build = PackedBert.compile_layers; "
    "PackedBert.compile_layers = lambda self: build(self, backend='aot_eager')"
)


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("singles") / "corpus"
    path.mkdir()
    make_corpus(path, objective="none")
    return path


def test_modernbert_trains_evaluates_and_exports(trainer: Trainer, singles: Path, tmp_path: Path) -> None:
    overrides = (f"data.path={singles}", *MODERNBERT, "optim.lr=0.01", "steps=30", "log.every=5", "zero=2")
    result = trainer.run(*overrides, ranks=2)
    assert result.codes == (0, 0), result.stderrs
    losses = result.series("train/loss")
    assert losses[-1] < losses[0] - 0.05
    assert result.series("eval/mlm_loss")
    assert not result.series("eval/nsp_loss")  # there are no pairs to evaluate

    out = tmp_path / "out"
    assert export(result.run, out) < 1e-4
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(["a b c", "d"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, 61)


def test_modernbert_on_pairs_is_one_line(trainer: Trainer, corpus: Path) -> None:
    result = trainer.run(f"data.path={corpus}", *MODERNBERT)
    assert result.code == 64
    (error,) = result.errors
    assert "has no next-sentence head" in error
    assert "prepare with objective=none" in error


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones(trainer: Trainer, corpus: Path) -> None:
    plain, compiled = (
        trainer.run(f"data.path={corpus}", "zero=2", f"compile={on}", "steps=3", ranks=2, before=WITHOUT_COMPILER)
        for on in ("false", "true")
    )
    assert compiled.codes == (0, 0), compiled.stderrs
    assert compiled.series("train/loss") == pytest.approx(plain.series("train/loss"), abs=1e-5)
    assert compiled.series("eval/loss") == pytest.approx(plain.series("eval/loss"), abs=1e-5)


def test_no_compiler_is_one_line_before_anything_else(trainer: Trainer, corpus: Path) -> None:
    """Case 61: it was 252 lines of traceback, after the model was built."""
    hidden = "import os; os.environ['PATH'] = '/nowhere'; os.environ.pop('CXX', None)"
    result = trainer.run(f"data.path={corpus}", "compile=true", ranks=2, before=hidden)
    assert result.codes == (64, 64)
    (error,) = result.errors
    assert "compile=true: needs a C++ compiler, and there is no " in error
    assert "Traceback" not in result.stderr
    assert not result.metrics


def test_the_slowest_rank_is_named(trainer: Trainer, corpus: Path) -> None:
    slow = (
        "import os, time; from pretrain.model.bert import PackedBert; forward = PackedBert.forward; "
        "wait = 0.05 * int(os.environ['RANK']); "
        "PackedBert.forward = lambda self, batch: (time.sleep(wait), forward(self, batch))[1]"
    )
    result = trainer.run(f"data.path={corpus}", "steps=3", ranks=2, before=slow)
    assert result.codes == (0, 0), result.stderrs
    line = result.metrics[-1]
    assert line["time/slowest_rank"] == 1
    assert line["time/work_max_seconds"] - line["time/work_min_seconds"] > 0.05  # two micro-batches a step
    assert line["time/step_seconds"] >= line["time/work_max_seconds"]
    assert line["train/pairs"] == 16  # a step's, at log.every=1
    assert 16 <= line["train/masked_tokens"] <= 16 * 20
    assert 0 < line["data/padding_fraction"] < 1
    assert line["memory/peak_gib"] > 0.05
