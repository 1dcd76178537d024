"""Held-out splits with names evaluated beside `val`: the same figures on any number of ranks, mapped or streamed."""

from pathlib import Path

import pytest

from tests.support import Trainer, make_corpus

NAMED = {"mail": 9, "news": 21}
MEASURES = ("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "loss")


@pytest.mark.parametrize("val", [13, 0])
def test_every_named_split_is_evaluated_alike_on_one_and_two_ranks(trainer: Trainer, tmp_path: Path, val: int) -> None:
    """Of sizes that no batch divides; without `val`, too."""
    make_corpus(tmp_path / "corpus", samples=64, val=val, named_val=NAMED)
    given = (f"data.path={tmp_path}/corpus", "steps=2", "eval.every=1")
    one, two = (trainer.run(*given, ranks=ranks) for ranks in (1, 2))
    streamed = trainer.run(*given, "data.access=stream", "data.lanes=4", f"data.cache_dir={tmp_path}/cache")
    for result in (one, two, streamed):
        assert set(result.codes) == {0}, result.stderrs
        assert "no held-out split" not in result.stderr
    found = []
    for name in ("", "mail/", "news/"):
        for measure in MEASURES:
            key = f"eval/{name}{measure}"
            ours, theirs = one.series(key), two.series(key)
            assert len(ours) == (2 if val or name else 0), key
            assert ours == pytest.approx(theirs, rel=1e-5), key
            assert len(streamed.series(key)) == len(ours)
        found.append(one.series(f"eval/{name}mlm_loss"))
    assert found[1] != found[2]
    assert "news/mlm_loss " in one.stderr
