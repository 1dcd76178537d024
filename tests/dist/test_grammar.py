"""Minimal pairs inside a run: the same to the last digit on any number of ranks, and as the command has them."""

import json
from pathlib import Path

import pytest

from pretrain import grammar
from pretrain.telemetry.report import read_run, run_facts
from tests.support import Trainer

PAIRS = [("abc a", "ba c"), ("cab", "bac"), ("a b", "a b c"), ("f gh", "gh f"), ("x", "y"), ("mno p q", "p q mno")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, pairs in (("noun_agreement-1", PAIRS), ("order-2", PAIRS[::-1][:5])):
        (folder / f"{name}.tsv").write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs))
    return folder


@pytest.mark.slow
def test_one_rank_two_sharded_ones_and_a_stream_give_the_same(
    trainer: Trainer, corpus: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights hardly move, so they are the same in all runs."""
    given = (f"data.path={corpus}", f"eval.grammar={data}", "eval.grammar_every=2", "steps=3", "optim.lr=1e-12")
    one, two = trainer.run(*given), trainer.run(*given, "zero=3", ranks=2)
    streamed = trainer.run(*given, "data.access=stream", "data.lanes=4", f"data.cache_dir={tmp_path}/cache")
    keys = {key for row in one.metrics for key in row if key.startswith("eval/grammar")}
    assert {f"eval/grammar_{name}" for name in ("accuracy", "frequencies_accuracy", "gain", "sampling_error")} < keys
    assert {"eval/grammar_agreement_accuracy", "eval/grammar/noun_agreement", "eval/grammar/order"} < keys
    for result in (one, two, streamed):
        assert set(result.codes) == {0}, result.stderrs
        for key in keys:
            assert result.series(key) == one.series(key), key
        assert len(result.series("eval/grammar_accuracy")) == 2  # at step 2, and at the end
        assert len(result.series("eval/mlm_loss")) == 1
        assert "grammar_gain " in result.stderr
        assert "grammar/order" not in result.stderr
    shown = run_facts(read_run(one.run, "one"))
    assert shown["grammar, minimal pairs"].endswith(f"{one.series('eval/grammar_accuracy')[-1]:.1%}")
    assert grammar.main([f"model={one.run}", f"data=[{data}]", f"out={tmp_path}/o.json"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())["minimal_pairs"]
    assert found["groups"]["all"]["within_word_l2r"]["value"] == one.series("eval/grammar_accuracy")[-1]
    assert found["groups"]["all"]["frequencies"]["value"] == one.series("eval/grammar_frequencies_accuracy")[-1]
    assert 0 < found["groups"]["all"]["within_word_l2r"]["value"] < 1


def test_a_bad_file_ends_a_run_before_it_begins(trainer: Trainer, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text("a\nb\nc\n")
    result = trainer.run(f"data.path={corpus}", f"eval.grammar={tmp_path}/odd.txt", ranks=2)
    assert result.codes == (64, 64)
    assert result.errors == [
        f"error: {tmp_path}/odd.txt: line 3: an odd number of lines, and a pair is two of them; mend it"
    ]
    assert not (result.run / "metrics.jsonl").exists()
