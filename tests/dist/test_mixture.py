"""A run over a mixture: the same on one and two ranks, to the bit after a kill; each corpus has its own figures."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.dist.test_curves import KILLED
from tests.dist.test_resume import bitwise, timeless
from tests.support import Trainer, make_corpus

LOGGED = ("samples", "tokens", "train/masked_tokens", "train/lr", "mixture/en/samples", "mixture/de/epochs")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """English gives way to German, of which there is so little that it is read several times."""
    root = tmp_path_factory.mktemp("mixture")
    make_corpus(root / "en", samples=200, val=20, seed=1)
    make_corpus(root / "de", samples=12, val=9, seed=2)
    weights = f"[{{path:{root}/en,weight:[[0,0.9],[1,0.3]]}},{{path:{root}/de,weight:[[0,0.1],[1,0.7]]}}]"
    return (f"data.mixture={weights}", "checkpoint.every=3", "eval.every=3", "zero=1", "model.dropout=0.1")


STREAM = ("data.access=stream", "data.lanes=4", "data.window=8")


@pytest.mark.parametrize("access", [(), pytest.param(STREAM, marks=pytest.mark.slow)], ids=["mapped", "stream"])
def test_killed_in_a_mixture_it_goes_on_to_the_same_bits(
    trainer: Trainer, overrides: Sequence[str], tmp_path: Path, access: Sequence[str]
) -> None:
    series = []
    overrides = (*overrides, *access)
    for ranks in (1, 2):
        whole = trainer.run(*overrides, ranks=ranks)
        assert set(whole.codes) == {0}, whole.stderrs
        series.append({key: whole.series(key) for key in LOGGED})
        if ranks == 1:
            root = tmp_path / "killed"
            killed = trainer.run(*overrides, f"runs_root={root}", before=KILLED.format(root=str(root)))
            assert -9 in killed.codes, killed.stderrs
            resumed = trainer.run(*overrides, f"runs_root={root}")
            assert resumed.code == 0, resumed.stderr
            assert "resuming at step 3 of 6" in resumed.stderr
            assert timeless(resumed) == timeless(whole)
            assert bitwise(resumed, whole)
            assert "data a mixture of 2 corpora\n  en 90.0% to 30.0%: 200 samples of up to 24 tokens" in whole.stderr
            both = [whole.series(f"eval/{name}/mlm_loss") for name in ("en", "de")]
            means = [sum(pair) / 2 for pair in zip(*both, strict=True)]
            assert whole.series("eval/mlm_loss") == pytest.approx(means)
            assert both[0] != both[1]
    assert series[0] == series[1]
    assert series[0]["mixture/de/epochs"][-1] > 2  # German, four times over
    assert series[0]["mixture/en/samples"][-1] + 12 * series[0]["mixture/de/epochs"][-1] == pytest.approx(96)


def test_other_weights_are_another_order(trainer: Trainer, overrides: Sequence[str], tmp_path: Path) -> None:
    """Refused when resuming, in a line; and a curve's length is part of it."""
    stopped = trainer.run(*overrides, f"runs_root={tmp_path}", "stop_at=3")
    assert stopped.code == 75, stopped.stderr
    refused = trainer.run(*overrides, f"runs_root={tmp_path}", "steps=9")
    assert refused.code == 64
    (line,) = refused.errors
    assert "was trained with data=" in line
    assert "other samples would follow; restore it, or add resume.allow=[data]" in line
