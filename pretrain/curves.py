"""Curves as values: what is a number may change over the run, as a pure function of the samples consumed.

A curve is written where the number would stand: `[[0, 1.0], [0.1, 1.0], [0.6, 0.01], [0.6, 0]]`, points of (share of
the run's samples, value). Before the first point and after the last the value stays; two points at one share are a
jump, of which the second counts from there on. Between points a curve runs straight, or geometrically (a constant ratio
per share) where it is asked to and both values are positive. Never of the clock: a run that is killed and goes on at
any world size sees the same values.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloze.errors import UserError


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
    def is_constant(self) -> bool:
        return len(set(self.values)) == 1


def parse_curve(value: Any, key: str, *, least: float, most: float = float("inf"), geometric: bool = False) -> Curve:
    """A number, or a list of [share, value] points, as a `Curve`.

    Raises `UserError`, which names `key`, for anything else, for shares that decrease or lie outside [0, 1], and for
    values outside [least, most].
    """
    points = [[0.0, value]] if _is_number(value) else value
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
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
            span = f"at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
            raise UserError(f"{key}: the value {number} is not {span}")
        before = share
    return Curve(tuple((float(share), float(number)) for share, number in points), geometric)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
