"""Phases: a run over two lengths and rates, killed in a phase or stopped between two, goes on to the same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cloze import cli
from pretrain.config import TrainConfig
from pretrain.phases import phases_of
from tests.dist.test_curves import KILLED
from tests.dist.test_resume import bitwise, timeless
from tests.support import TINY, Trainer, default_masking, make_corpus


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Short samples, then long ones in smaller batches at a falling rate, then short ones again."""
    root = tmp_path_factory.mktemp("phases")
    make_corpus(root / "short", samples=90, val=8, seed=1, max_len=12, objective="none")
    make_corpus(root / "long", samples=70, val=8, seed=2, max_len=40, objective="none")
    phases = (
        f"[{{from:0.34,data.path:{root}/long,global_batch_size:8,schedule:wsd_sqrt,schedule.decay_fraction:1.0,"
        "schedule.warmup_fraction:0,optim.weight_decay:0.1,model.extra:{global_rope_theta:160000.0,"
        "global_rope_scaling:{rope_type:yarn,factor:4,original_max_position_embeddings:16}}},"
        f"{{from:0.67,data.path:{root}/short,model.dropout:0.2}}]"
    )
    modern = ("model.architecture=modernbert", "model.num_layers=2", "model.intermediate_size=48")
    return (
        f"data.path={root}/short", f"phases={phases}", *modern, "schedule=constant", "schedule.warmup_fraction=0.2",
        "global_batch_size=16", "checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=2", "zero=1",
        "data.masking_probability=[[0,0.3],[1,0.15]]",
    )  # fmt: skip


def test_killed_in_and_stopped_between_phases(trainer: Trainer, overrides: Sequence[str], tmp_path: Path) -> None:
    whole = trainer.run(*overrides)
    assert whole.code == 0, whole.stderr
    assert "phase 2 of 3, from step 2\ndata " in whole.stderr
    assert whole.series("samples") == [16, 32, 40, 48, 56, 64]
    rates = {line["step"]: line["train/lr"] for line in whole.metrics if "train/lr" in line}
    assert rates[2] == rates[3] == 0.003  # constant after its warm-up; the decay begins with its phase
    assert rates[4] < rates[3]
    assert rates[5] < rates[4]

    root = tmp_path / "killed"
    killed = trainer.run(*overrides, f"runs_root={root}", before=KILLED.format(root=str(root)))
    assert killed.code == -9, killed.stderr
    resumed = trainer.run(*overrides, f"runs_root={root}")
    assert resumed.code == 0, resumed.stderr
    assert "in phase" in resumed.stderr
    assert timeless(resumed) == timeless(whole)
    assert bitwise(resumed, whole)

    root = tmp_path / "stopped"
    for stop in (2, 4):  # where a phase has ended, and the next has not begun
        stopped = trainer.run(*overrides, f"runs_root={root}", f"stop_at={stop}")
        assert stopped.code == 75, stopped.stderr
    ended = trainer.run(*overrides, f"runs_root={root}")
    assert ended.code == 0, ended.stderr
    assert "resuming at step 4 of 6 in phase 3 of 3" in ended.stderr
    assert bitwise(ended, whole)


def test_on_two_ranks_the_same_samples(trainer: Trainer, overrides: Sequence[str]) -> None:
    one, two = (trainer.run(*overrides, ranks=ranks) for ranks in (1, 2))
    assert set(two.codes) == {0}, two.stderrs
    for key in ("samples", "tokens", "train/masked_tokens", "train/lr", "curves/data.masking_probability"):
        assert one.series(key) == two.series(key)


def test_a_corpus_goes_on_where_it_was_left(overrides: Sequence[str]) -> None:
    """The third phase reads on in the order of the first; a share holds where no phase writes otherwise."""
    config = cli.compose("train", TrainConfig, ["run=r", *TINY, *overrides])
    first, second, third = phases_of(config)
    assert (first.data_position, second.data_position, third.data_position) == (0, 0, 32)
    assert [phase.data_samples for phase in (first, second, third)] == [48, 16, 48]
    masks = third.span_of("data.masking_probability")
    assert (masks.first_sample, masks.end_sample) == (0, 64)
    rate = third.span_of("schedule.kind")
    assert (rate.first_step, rate.end_step) == (2, 6)


@pytest.mark.parametrize(
    ("phases", "line"),
    [
        ("[{from:0.5,data.path:OTHER}]", "phases: phase 2: OTHER has another tokenizer than"),
        (
            "[{from:0.5,data.path:LONG}]",
            "phases: phase 2: LONG has samples of 90 tokens, more than model.max_positions=64",
        ),
        ("[{from:0.5,data.path:NSP}]", "phases: phase 2: NSP was prepared with objective=nsp"),
        ("[{from:2,optim.lr:0.1}]", "phases: one begins at from=2, no share of the run between 0 and 1"),
        ("[{from:0.5,seed:3}]", "phases: phase 2 sets seed; a phase may set data.path"),
        ("[{from:0.5,schedule:steep}]", "phases: phase 2: schedule=steep: no such kind; there are constant, cosine"),
        ("[{from:0.5,model.extra.local_attention:8}]", "phases: phase 2: sets model.extra.local_attention, which"),
        ("[{from:0.5,data.mixture:[{path:a,weight:0}]}]", "phases: phase 2: data.mixture: all weights are 0 at 0"),
        ("[{from:0.5,micro_batch_size:3}]", "global_batch_size=16: not a multiple of micro_batch_size=3"),
    ],
)
def test_phases_that_do_not_fit_are_refused_before_the_first_step(
    trainer: Trainer, overrides: Sequence[str], tmp_path: Path, phases: str, line: str
) -> None:
    if "OTHER" in phases:
        make_corpus(tmp_path / "x", samples=8, vocab_size=90, objective="none")
    elif "LONG" in phases:
        make_corpus(
            tmp_path / "x", samples=8, max_len=90, objective="none", masking=default_masking(max_predictions=40)
        )
    elif "NSP" in phases:
        make_corpus(tmp_path / "x", samples=8)
    for name in ("OTHER", "LONG", "NSP"):
        phases, line = phases.replace(name, f"{tmp_path}/x"), line.replace(name, f"{tmp_path}/x")
    result = trainer.run(*overrides, f"phases={phases}")
    assert result.code == 64
    (error,) = result.errors
    assert line in error
    assert not result.metrics
