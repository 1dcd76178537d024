"""Charts drawn when a page is written: round ticks, axes that one line does not take, gaps where there is nothing."""

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cloze.drawing import HEIGHT, WIDTH, Dot, Line, bars, dots, lines, log_ticks, over_key, short, ticks


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(3, 3, 5) == [3]
    assert log_ticks(0.01, 100) == [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
    assert [short(value) for value in (0, 4500, 12_345, 1_234_567, 2e-5, 0.25, -3.5)] == [
        *("0", "4,500", "12.35k", "1.235M", "2e-5", "0.25", "-3.5")
    ]
    assert short(5e-4, 0.002) == "0.0005", "one axis, one form"


@given(st.floats(-1e6, 1e6), st.floats(0.001, 1e6))
def test_any_range_has_ticks(low: float, width: float) -> None:
    found = ticks(low, low + width, 5)
    assert 2 <= len(found) <= 12
    assert found == sorted(found)
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)


def heights(svg: str, number: int) -> list[float]:
    """Where the points of a line lie, from above."""
    path = re.findall(r'<path class="line[^>]* d="([^"]*)"', svg)[number]
    return [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]


def test_a_line_that_diverged_flattens_neither_the_others_nor_itself() -> None:
    xs = list(range(100))
    calm = [9 - 0.05 * x for x in xs]
    wild = [value if x < 60 else 1e5 * x for x, value in zip(xs, calm, strict=True)]
    together = lines("loss", [Line(xs, calm, rough=True), Line(xs, wild, "eval", 1)])
    assert max(heights(together, 0)) - min(heights(together, 0)) > HEIGHT / 2
    alone = lines("loss", [Line(xs, wild, rough=True), Line(xs, [6.0] * 100, "rule", 1)])
    assert max(heights(alone, 0)[:60]) - min(heights(alone, 0)[:60]) > 10
    assert min(heights(alone, 0)) >= 12, "what is beyond the axis lies at its edge"


def test_gaps_one_point_and_nothing() -> None:
    svg = lines("<b>", [Line([1, 2, 3, 4], [1.0, None, 2.0, 3.0])])
    assert re.search(r' d="(M[^ML]+)(M[^ML]+)(L[^ML]+)"', svg)
    assert 'aria-label="&lt;b&gt;"' in svg
    assert lines("one", [Line([7], [0.0])]).count("<circle") == 1
    assert lines("none", [Line([1, 2], [None, None]), Line([], [])]) == ""
    assert lines("log", [Line([1, 2, 3], [0.0, 10.0, 1000.0])], log=True).count("<circle") == 2
    assert dots("none", []) == ""


def test_results_over_a_key() -> None:
    svg = over_key("f1 by lr", ["1e-4", "1e-3", "1e-2"], [0.5, 0.9, 0.7], ["<a>", "b", "c"], percent=True)
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert abs((places[1] - places[0]) - (places[2] - places[1])) < 0.2, "a rate is read by its powers"
    assert all(0 < x < WIDTH for x in places)
    assert "&lt;a&gt;" in svg
    assert over_key("", ["linear", "crf"], [1, 2], ["a", "b"]) == ""
    assert over_key("", ["3", "3"], [1, 2], ["a", "b"]) == ""
    assert dots("one", [Dot(3, 1, "a")]).count("<circle") == 1


def test_labels_do_not_lie_upon_each_other() -> None:
    svg = dots("near", [Dot(1, 0.5 + n / 10_000, f"model {n}") for n in range(5)] + [Dot(9, 0.9, "far")])
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>model', svg))
    assert len(heights) > 1
    assert all(b - a > 11 for a, b in pairwise(heights))
    assert svg.count("<title>model") == 5


def test_one_full_bar_leaves_the_others_to_be_seen() -> None:
    svg = bars("lengths", [0, 8, 16, 24], [5, 8, 900], 24)
    tall = [float(height) for height in re.findall(r'height="([\d.]+)"/>', svg)]
    assert tall[0] > 30
    assert abs(tall[1] / tall[0] - 1.6) < 0.02
    assert "▲ 900" in svg
    assert "▲ 8<" not in svg
