"""Curves against a slow reference that walks from point to point."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloze.errors import UserError
from pretrain.curves import Curve, parse_curve

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
    curve = parse_curve([[0, 1.0], [0.1, 1.0], [0.6, 0.01], [0.6, 0]], "model.distance_bias", least=0, geometric=True)
    assert curve.at(0.05) == curve.at(0.1) == 1.0
    assert curve.at(0.35) == pytest.approx(0.1)
    assert curve.at(0.59999999) == pytest.approx(0.01, rel=1e-3)
    assert curve.at(0.6) == curve.at(1.0) == 0.0
    assert parse_curve(0.5, "k", least=0).at(0.7) == 0.5
    assert parse_curve(0.5, "k", least=0).is_constant
    assert not curve.is_constant


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
