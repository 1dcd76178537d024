"""Curves against a slow reference that walks from point to point."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.errors import UserError
from pretrain.curves import Curve, parse_curve, shares_that_tell, written_curves

SHARES = st.floats(0, 1)
POINTS = st.lists(st.tuples(SHARES, st.floats(0.001, 100)), min_size=1, max_size=6).map(
    lambda points: tuple(sorted(points, key=lambda point: point[0]))
)


def reference(points: tuple[tuple[float, float], ...], geometric: bool, share: float) -> float:
    value = points[0][1]
    for (begin, first), (end, last) in pairwise(points):
        if share >= end:
            value = last
        elif share >= begin:
            part = (share - begin) / (end - begin)
            if geometric:
                return math.exp((1 - part) * math.log(first) + part * math.log(last))
            return (1 - part) * first + part * last
    return value


@given(points=POINTS, geometric=st.booleans(), share=SHARES)
def test_equals_the_reference(points: tuple[tuple[float, float], ...], geometric: bool, share: float) -> None:
    assert Curve(points, geometric).at(share) == pytest.approx(reference(points, geometric, share), rel=1e-9)


def test_a_jump_counts_from_its_share_on() -> None:
    curve = parse_curve([[0, 1.0], [0.1, 1.0], [0.6, 0.01], [0.6, 0]], "model.distance_bias", least=0)
    assert curve.at(0.05) == curve.at(0.1) == 1.0
    assert curve.at(0.35) == pytest.approx(0.1)
    assert curve.at(0.59999999) == pytest.approx(0.01, rel=1e-3)
    assert curve.at(0.6) == curve.at(1.0) == 0.0
    assert parse_curve(0.5, "k", least=0).at(0.7) == 0.5
    assert parse_curve(0.5, "k", least=0).is_constant
    assert not curve.is_constant


def test_a_word_says_how_it_runs_between_points() -> None:
    points = [[0, 1.0], [1, 0.01]]
    assert parse_curve(points, "optim.lr", least=0).at(0.5) == pytest.approx(0.505)
    assert parse_curve(["geometric", *points], "optim.lr", least=0).at(0.5) == pytest.approx(0.1)
    assert parse_curve(points, "model.distance_bias", least=0).at(0.5) == pytest.approx(0.1)
    assert parse_curve(["linear", *points], "model.distance_bias", least=0).at(0.5) == pytest.approx(0.505)


def test_shares_that_tell_see_both_sides_of_a_jump() -> None:
    """Both are 0 only between 0.3 and 0.5, and only before the jump is their sum above 1."""
    one = Curve(((0, 0.7), (0.3, 0.7), (0.3, 0.0)))
    other = Curve(((0, 0.0), (0.3, 0.6), (0.3, 0.0), (0.5, 0.0), (0.5, 0.4)))
    sums = [one.at(share) + other.at(share) for share in shares_that_tell(one, other)]
    assert max(sums) == pytest.approx(1.3)
    assert min(sums) == 0


def test_curves_are_found_in_a_saved_configuration() -> None:
    section = {"b": [[0, 1], [1, 2]], "c": 3, "d": [[0, 1], [1, 1]]}
    tree = {"a": section, "e": ["x"], "f": [], "g": ["geometric", [0, 1], [1, 9]]}
    found = dict(written_curves(tree))
    assert {key: curve.at(0.5) for key, curve in found.items()} == {"a.b": 1.5, "g": pytest.approx(3)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[0.5, 1], [0.4, 0]], "the share 0.4 comes after 0.5"),
        ([[0, 1], [1.5, 0]], "lies outside the run"),
        ([[-0.1, 1]], "lies outside the run"),
        ([[0, -1]], "the value -1 is not from 0 to 2"),
        (3, "the value 3 is not from 0 to 2"),
        ([[0]], "is not [share, value]"),
        ([0, 1], "is not [share, value]"),
        ([[0, True]], "is not [share, value]"),
        ([], "neither a number nor a list"),
        (["geometric"], "neither a number nor a list"),
        (["cubic", [0, 1]], "the point cubic is not [share, value]"),
        ("high", "neither a number nor a list"),
        (None, "neither a number nor a list"),
        (float("nan"), "neither a number nor a list"),
    ],
)
def test_what_is_no_curve_is_one_line(value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_curve(value, "model.distance_bias", least=0, most=2)
    assert str(error.value).startswith("model.distance_bias")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
