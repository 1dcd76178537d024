"""What is told where ranks differ: pure functions over what was gathered. tests/dist has the ranks themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze import cli
from pretrain.agreement import MOST_CLOCK_SECONDS, clocks_apart, first_difference, same_device, settings, source_hash
from pretrain.config import TrainConfig
from tests.support import ROOT


def test_what_most_have_is_right() -> None:
    names = ["a (rank 0)", "b (rank 1)", "c (rank 2)"]
    found = [{"torch": "2.12", "seed": "1"}, {"torch": "2.13", "seed": "1"}, {"torch": "2.13", "seed": "1"}]
    line = first_difference(found, names)
    assert line == "a (rank 0): torch is 2.12, b (rank 1) has 2.13; make them equal"
    found = [{"steps": "5", "seed": "1", "zero": "1"}, {"steps": "6", "seed": "2"}]
    line = first_difference(found, names)
    assert line == "b (rank 1): steps is 6, a (rank 0) has 5 (and seed, zero); make them equal"
    line = first_difference([{"zero": "1"}, {}], names)
    assert line == "b (rank 1): zero is not there, a (rank 0) has 1; make them equal"


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=5),
    st.lists(st.floats(-2, 2), min_size=5, max_size=5),
)
def test_clocks_that_agree_are_never_told_apart(waits: list[tuple[float, float]], skews: list[float]) -> None:
    """However long ranks were held up before and after the moment, on a machine with other work."""
    moment = 1e9
    times = [
        (moment - before + skew, moment + after + skew) for (before, after), skew in zip(waits, skews, strict=False)
    ]
    assert clocks_apart(times) is None


@given(st.floats(2 * MOST_CLOCK_SECONDS, 1e6), st.integers(0, 2))
def test_a_clock_that_is_ahead_is_named(ahead: float, fast: int) -> None:
    times = [(1e9 - 1 + ahead * (rank == fast), 1e9 + 1 + ahead * (rank == fast)) for rank in range(3)]
    found = clocks_apart(times)
    assert found
    assert found[0] == fast
    assert found[1] != fast
    assert found[2] == pytest.approx(ahead - 2)


@pytest.mark.parametrize(
    ("master", "rows", "pair"),
    [
        ("10.0.0.1", [(7, 0, 0), (8, 1, 0)], None),
        ("10.0.0.1", [(7, 0, 0), (7, 0, 0)], None),  # two ranks of one host
        ("10.0.0.1", [(7, 0, 0), (8, 1, 0), (7, 2, 0)], (0, 2)),  # one machine as two hosts
        ("127.0.0.1", [(7, 0, 0), (7, 1, 0)], None),  # whoever says so means it
        ("10.0.0.1", [(7, -1, 0), (7, -1, 0)], None),  # by hand, or in two containers
        ("10.0.0.1", [(7, 0, 5), (7, 0, 6)], None),
        ("127.0.0.1", [(7, -1, 5), (8, -1, 5)], (0, 1)),  # one GPU
    ],
)
def test_a_machine_or_gpu_that_is_there_twice(
    monkeypatch: pytest.MonkeyPatch, master: str, rows: list[tuple[float, ...]], pair: tuple[int, int] | None
) -> None:
    monkeypatch.setenv("MASTER_ADDR", master)
    assert same_device([(0.0, 0.0, 1.0, *row) for row in rows]) == pair


def test_settings_are_keys_without_secrets_and_places() -> None:
    def of(*overrides: str) -> dict[str, str]:
        return settings(cli.compose("train", TrainConfig, ["run=r", "data.path=d", *overrides]))

    plain = of()
    assert plain["seed"] == "1"
    assert "optim.lr" in plain
    assert of("data.path=e", "data.cache_dir=/scratch", "runs_root=elsewhere") == plain
    assert of("seed=2") == plain | {"seed": "2"}
    secret = of("checkpoint.upload='s3://user:hunter2@bucket/x'")
    assert not any("hunter2" in value for value in secret.values())


def test_the_hash_of_sources_is_theirs() -> None:
    assert source_hash(["cloze"]) == source_hash(["cloze"]) != source_hash(["conf"])
    assert (ROOT / "conf").is_dir()
