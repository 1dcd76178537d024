"""Curves as values: what is a number may change over the run, as a pure function of the samples consumed.

A curve is written where the number would stand: `[[0, 1.0], [0.1, 1.0], [0.6, 0.01], [0.6, 0]]`, points of (share of
the run's samples, value). Before the first point and after the last the value stays; two points at one share are a
jump, of which the second counts from there on. Between points a curve runs straight, or geometrically (a constant ratio
per share, where both values are positive): a word before the points says which, `[geometric, [0, 1e-3], [1, 1e-5]]`;
without it a distance bias falls geometrically, all others run straight. Never of the clock: a run that is killed and
goes on at any world size sees the same values.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cloze.errors import UserError

_WAYS = ("linear", "geometric")
_GEOMETRIC = ("model.distance_bias",)  # keys whose curves are so where they do not say


@dataclass(frozen=True)
class Curve:
    """Values over the share of the run, in [0, 1]."""

    points: tuple[tuple[float, float], ...]  # (share, value), shares never decrease
    geometric: bool = False

    def at(self, share: float) -> float:
        """The value when `share` of the run's samples are consumed."""
        shares = [point[0] for point in self.points]
        after = bisect_right(shares, share)  # of points at one share, the last
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (begin, first), (end, last) = self.points[after - 1], self.points[after]
        part = (share - begin) / (end - begin)
        if self.geometric and first > 0 and last > 0:
            return float(first * (last / first) ** part)
        return first + (last - first) * part

    @property
    def values(self) -> list[float]:
        """Those of its points."""
        return [value for _, value in self.points]

    @property
    def peak(self) -> float:
        return max(self.values)

    @property
    def is_constant(self) -> bool:
        return len(set(self.values)) == 1


def is_curve(value: Any) -> bool:
    """Whether a value of a configuration is written as a curve, not as a number."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def parse_curve(value: Any, key: str, *, least: float, most: float = math.inf) -> Curve:
    """A number, or a list of [share, value] points, perhaps behind `linear` or `geometric`, as a `Curve`.

    Raises `UserError`, which names `key`, for anything else, for shares that decrease or lie outside [0, 1], and for
    values outside [least, most].
    """
    points, geometric = [[0.0, value]] if _is_number(value) else value, key in _GEOMETRIC
    if is_curve(points) and points and points[0] in _WAYS:
        points, geometric = points[1:], points[0] == "geometric"
    if not is_curve(points) or not points:
        raise UserError(f"{key}={value}: is neither a number nor a list of [share, value], such as [[0,1.0],[0.5,0]]")
    before = 0.0
    for point in points:
        pair = isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 2
        if not pair or not all(_is_number(number) for number in point):
            raise UserError(f"{key}: the point {point} is not [share, value], such as [0.5, 0.01]")
        share, number = point
        if not 0 <= share <= 1:
            raise UserError(f"{key}: the point {list(point)} lies outside the run; shares go from 0 to 1")
        if share < before:
            raise UserError(f"{key}: the share {share} comes after {before}; give the points in order")
        if not least <= number <= most:
            span = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise UserError(f"{key}: the value {number} is not {span}")
        before = share
    return Curve(tuple((float(share), float(number)) for share, number in points), geometric)


def shares_that_tell(*curves: Curve) -> list[float]:
    """Shares at which to look whether something holds of these curves together: at points, before and between them."""
    points = sorted({0.0, 1.0, *(share for curve in curves for share, _ in curve.points)})
    before = [math.nextafter(share, -1.0) for share in points[1:]]
    between = [(one + other) / 2 for one, other in pairwise(points)]
    return sorted([*points, *before, *between])


def written_curves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Curve]]:
    """(dotted key, curve) of the curves in a saved configuration, but for constant ones and what is none."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from written_curves(value, f"{prefix}{name}.")
        elif is_curve(value):
            try:
                curve = parse_curve(value, f"{prefix}{name}", least=-math.inf)
            except UserError:  # another list
                continue
            if not curve.is_constant:
                yield f"{prefix}{name}", curve


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
