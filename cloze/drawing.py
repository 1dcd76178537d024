"""Charts as SVG, drawn when a page is written: they need no script to read, and print as they stand.

Numbers in, text out; colours and fonts are the page's own (`cloze/page/page.css`). Text is escaped.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 480, 230
_TOP, _RIGHT, _BOTTOM = 12, 12, 24
_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
_LETTER = 6.6  # pixels
_CUT = 0.01  # of the points of a long line, at either end, that an axis need not show
_LONG = 40  # points
_BEYOND = 5.0  # times the least of the greatest values: a line that diverged does not flatten the others
_DOTTED = 9.0  # pixels between points that are drawn as dots, too
_LABEL_GAP = 11.5  # pixels between two labels, one above the other
_MOST_LABELS = 24
_SIZES = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))

Value = float | None


class Line(NamedTuple):
    """One line: places, values (None is a gap), how it looks, and the number of its colour."""

    xs: Sequence[Value]
    ys: Sequence[Value]
    kind: str = "train"  # train, eval, rule: a class of the style sheet
    colour: int = 0
    rough: bool = False  # whether it may leap: an axis need not show where it leaps to


class Dot(NamedTuple):
    """One result: where it lies, and what stands beside it."""

    x: float
    y: float
    label: str


def lines(title: str, given: Sequence[Line], *, percent: bool = False, log: bool = False) -> str:
    """A chart of lines; "" where there is no point to draw. `log` is of the values."""
    known = [_points(line, log) for line in given]
    places = [x for points in known for x, _ in points]
    if not places:
        return ""
    xs = _wide(min(places), max(places))
    ys = _domain([(sorted(y for _, y in points), line) for points, line in zip(known, given, strict=True)], log)
    frame = _Frame(xs, ys, percent=percent, log_y=log)
    body = [*frame.axes()]
    for line, points in zip(given, known, strict=True):
        colour = f"var(--c{line.colour % 8})"
        if line.kind == "rule" and points:  # holds from one end to the other
            line = line._replace(xs=[xs[0], *line.xs, xs[1]], ys=[points[0][1], *line.ys, points[-1][1]])
        body.append(f'<path class="line {line.kind}" stroke="{colour}" d="{frame.path(line, log)}"/>')
        if line.kind != "rule" and frame.is_sparse(points):
            places_xy = ((frame.x(x), frame.y(y)) for x, y in points if ys[0] <= y <= ys[1])
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places_xy]
    return _svg(title, body)


def dots(title: str, given: Sequence[Dot], *, percent: bool = False, log_x: bool = False) -> str:
    """Results over one number, each with its label; "" where there is none."""
    if not given:
        return ""
    low, high = min(dot.x for dot in given), max(dot.x for dot in given)
    xs = (low / 1.3, high * 1.3) if log_x else _wide(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ys = _domain([(sorted(dot.y for dot in given), Line([], []))], False)
    frame = _Frame(xs, ys, percent=percent, log_x=log_x)
    body = [*frame.axes()]
    taken: list[tuple[float, float, float]] = []  # of labels: from, to, height
    for dot in given:
        place = f'cx="{frame.x(dot.x):.1f}" cy="{frame.y(dot.y):.1f}"'
        body.append(f'<circle {place} r="4" fill="var(--c0)"><title>{html.escape(dot.label)}</title></circle>')
    for dot in sorted(given, key=lambda dot: -dot.y):
        x, y, label = frame.x(dot.x), frame.y(dot.y), html.escape(dot.label)
        is_left = x > WIDTH / 2
        near, far = (x - 7, x - 7 - _LETTER * len(dot.label)) if is_left else (x + 7, x + 7 + _LETTER * len(dot.label))
        span = min(near, far), max(near, far)
        beside = [height for low, high, height in taken if low < span[1] and span[0] < high]
        y = max([y + 4, *(height + _LABEL_GAP for height in beside)])
        if y < HEIGHT - _BOTTOM + _LABEL_GAP and len(taken) < _MOST_LABELS:
            taken.append((*span, y))
            end = ' text-anchor="end"' if is_left else ""
            body.append(f'<text class="tick" x="{near:.1f}" y="{y:.1f}"{end}>{label}</text>')
    return _svg(title, body)


def over_key(
    title: str, values: Sequence[str], scores: Sequence[float], labels: Sequence[str], *, percent: bool = False
) -> str:
    """`dots` over the values of a key that varies, as text; "" where these are not all numbers, or all the same."""
    places = [number for value in values if (number := _number(value)) is not None]
    if len(places) < len(values) or len({*places}) < 2:
        return ""
    found = [Dot(x, y, label) for x, y, label in zip(places, scores, labels, strict=True)]
    return dots(title, found, percent=percent, log_x=min(places) > 0 and max(places) >= _BEYOND * min(places))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def bars(title: str, edges: Sequence[float], counts: Sequence[int], most: int) -> str:
    """Columns between `edges` (one more than counts); above one of more than `most` stands its count."""
    frame = _Frame((edges[0], edges[-1]), (0.0, 1.12 * most))
    body = [*frame.axes()]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, width = frame.x(low), max(1.0, frame.x(high) - frame.x(low) - 1)
        top = frame.y(min(count, most))
        body.append(
            f'<rect class="column" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{frame.y(0) - top:.1f}"/>'
        )
        if count > most:
            place = f'x="{min(x + width / 2, WIDTH - _RIGHT):.1f}" y="{top - 4:.1f}"'
            body.append(f'<text class="tick" text-anchor="end" {place}>▲ {count:,}</text>')
    return _svg(title, body)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(each for each in _ROUND if each * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between them where there are few."""
    decades = math.log10(high / low)
    factors = (1,) if decades > 4 else (1, 3) if decades > 1.5 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{factor}e{power}") for power in powers for factor in factors]
    found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
    return found if len(found) > 1 else ticks(low, high, 4)


def short(value: float, largest: float = 0.0) -> str:
    """`12k`, `3.5M`, `4,500`, `0.001`, `2e-5`; beside a number that is written out, the `largest`, `0.0005`."""
    if value == 0:
        return "0"
    size = abs(value)
    for least, unit, name in _SIZES:
        if size >= least:
            return f"{value / unit:.4g}{name}"
    if max(size, abs(largest)) < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


class _Frame:
    """Where values lie on the drawing."""

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        *,
        percent: bool = False,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        self._xs, self._ys, self._log_x, self._log_y, self._percent = xs, ys, log_x, log_y, percent
        self._y_ticks = log_ticks(*ys) if log_y else ticks(*ys, 5)
        self._largest = 0.0 if log_y else max(map(abs, self._y_ticks))
        self._left = 12 + _LETTER * max(len(self._told(tick)) for tick in self._y_ticks)

    def x(self, value: float) -> float:
        return _placed(value, self._xs, (self._left, WIDTH - _RIGHT), self._log_x)

    def y(self, value: float) -> float:
        return _placed(value, self._ys, (HEIGHT - _BOTTOM, _TOP), self._log_y)

    def axes(self) -> Iterator[str]:
        for tick in self._y_ticks:
            y = self.y(tick)
            yield f'<line class="grid" x1="{self._left:.0f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            place = f'x="{self._left - 6:.0f}" y="{y + 4:.1f}"'
            yield f'<text class="tick" text-anchor="end" {place}>{self._told(tick)}</text>'
        x_ticks = log_ticks(*self._xs) if self._log_x else ticks(*self._xs, 5)
        largest = 0.0 if self._log_x else max(map(abs, x_ticks))
        for tick in x_ticks:
            x = min(self.x(tick), WIDTH - _RIGHT - 4)
            told = short(tick, largest)
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 7}">{told}</text>'

    def is_sparse(self, points: Sequence[tuple[float, float]]) -> bool:
        """Whether points lie so far apart that each is worth a dot."""
        return len(points) == 1 or abs(self.x(points[-1][0]) - self.x(points[0][0])) > _DOTTED * (len(points) - 1) > 0

    def path(self, line: Line, log: bool) -> str:
        """The `d` of an SVG path: gaps at None, and what is beyond the axis at its edge."""
        found, pen = [], False
        for x, y in zip(line.xs, line.ys, strict=True):
            if not _is_shown(x, y, log):
                pen = False
                continue
            assert x is not None
            assert y is not None
            y = min(max(y, self._ys[0]), self._ys[1])
            found.append(f"{'L' if pen else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
            pen = True
        return "".join(found)

    def _told(self, tick: float) -> str:
        return f"{100 * tick:.4g}%" if self._percent else short(tick, self._largest)


def _points(line: Line, log: bool) -> list[tuple[float, float]]:
    pairs = zip(line.xs, line.ys, strict=True)
    return [(x, y) for x, y in pairs if x is not None and y is not None and _is_shown(x, y, log)]


def _is_shown(x: Value, y: Value, log: bool) -> bool:
    return x is not None and y is not None and math.isfinite(y) and (y > 0 or not log)


def _placed(value: float, span: tuple[float, float], to: tuple[float, float], log: bool) -> float:
    low, high, at = (math.log(each) for each in (*span, value)) if log else (*span, value)
    return to[0] + (at - low) / ((high - low) or 1.0) * (to[1] - to[0])


def _wide(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 1, high + 1)


def _domain(given: Sequence[tuple[Sequence[float], Line]], log: bool) -> tuple[float, float]:
    """What an axis shows of (values in order, their line): nearly all; what is far beyond the usual does not count."""
    spans, usual = [], []
    for values, line in given:
        if not values:
            continue
        cut = round(_CUT * (len(values) - 1)) if len(values) > _LONG else 0
        low, high, middle = values[cut], values[-1 - cut], values[len(values) // 2]
        if line.rough and len(values) > _LONG and low >= 0 and not log:
            high = min(high, max(low, _BEYOND * middle))
        spans.append((low, high))
        usual += [abs(high)] if line.kind != "rule" else []
    least = min(usual, default=0.0)
    counted = [span for span in spans if log or least == 0 or abs(span[1]) <= _BEYOND * least] or spans
    low, high = min(span[0] for span in counted), max(span[1] for span in counted)
    if high - low <= abs(high) * 1e-9:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if high else (-1.0, 1.0)
    if log:
        return low / 1.15, high * 1.15
    pad = (high - low) * 0.06
    return 0.0 if low >= 0 > low - pad else low - pad, high + pad


def _svg(title: str, body: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{html.escape(title)}">{"".join(body)}</svg>'
