"""Small line charts as SVG text: axes with round numbers, gaps at NaN, colours of the page's theme."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Number = int | float
Line = Sequence[tuple[Number, Number]]
Series = Mapping[str, Line]

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 26
MOST_POINTS = 320


def line_chart(
    series: Series,
    *,
    percent: bool = False,
    baselines: Mapping[str, Number] | None = None,
    smooth: bool = True,
) -> str:
    """One chart as an `<svg>`.

    Args:
        series: name -> (x, y) in order of x; a y that is not finite leaves a gap and a mark on the axis.
        percent: show y as a percentage, from 0.
        baselines: name -> y of a dashed line of the same colour (chance).
        smooth: draw a moving average over a faint line where there are many points.
    """
    points = [p for line in series.values() for p in line]
    good = [y for _, y in points if math.isfinite(y)]
    if not good:
        return '<p class="none">no finite value yet</p>'
    marks = {name: y for name, y in (baselines or {}).items() if math.isfinite(y)}
    log = not percent and log_scale(good)
    low, high, ticks = _axis(good + ([] if log else list(marks.values())), percent, log)
    scale = Scale(min(x for x, _ in points), max(x for x, _ in points), low, high, log)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', *_frame(scale, ticks, percent)]
    for number, (name, line) in enumerate(series.items()):
        colour = f"c{number % 6}"
        if name in marks and low <= marks[name] <= high:
            parts.append(_across(scale.y(marks[name]), f"chance {colour}"))
        many = smooth and len(line) > 60
        parts += _polylines(thin(line), scale, f"{colour} faint" if many else colour)
        if many:
            parts += _polylines(thin(moving_average(line)), scale, colour)
        if len(line) <= 40:
            parts += [_dot(name, x, y, scale, colour, percent) for x, y in line if math.isfinite(y)]
        parts += [_broken(scale.x(x)) for x, y in line if not math.isfinite(y)][:20]
    return "".join([*parts, "</svg>"])


class Scale(NamedTuple):
    """Where values stand on the picture; the y axis is linear or logarithmic."""

    x_low: Number
    x_high: Number
    y_low: Number
    y_high: Number
    log: bool

    def x(self, value: Number) -> Number:
        """Horizontal place; in the middle when there is only one."""
        wide = self.x_high - self.x_low
        return LEFT + ((value - self.x_low) / wide if wide else 0.5) * (WIDTH - LEFT - RIGHT)

    def y(self, value: Number) -> Number:
        """Vertical place, from the top."""
        low, high = self.y_low, self.y_high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _frame(scale: Scale, ticks: Sequence[Number], percent: bool) -> list[str]:
    """Grid lines, numbers on both axes, and the base line."""
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(_across(y, "grid"))
        parts.append(_text(LEFT - 7, y + 4, "end", _label(tick, percent)))
    for tick in _x_ticks(scale.x_low, scale.x_high):
        x = scale.x(tick)
        side = "end" if x > WIDTH - RIGHT - 16 else "middle"
        parts.append(_text(WIDTH - RIGHT / 2 if side == "end" else x, HEIGHT - 7, side, short(tick)))
    return [*parts, _across(HEIGHT - BOTTOM, "axis")]


def _across(y: Number, classes: str) -> str:
    return f'<line class="{classes}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: Number, y: Number, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _dot(name: str, x: Number, y: Number, scale: Scale, colour: str, percent: bool) -> str:
    title = f"{html.escape(name)}, step {short(x)}: {_label(y, percent, exact=True)}"
    place = f'cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}"'
    return f'<circle class="{colour}" {place} r="2.6"><title>{title}</title></circle>'


def _broken(x: Number) -> str:
    return f'<path class="broken" d="M{x:.1f} {HEIGHT - BOTTOM}l-4 7h8z"><title>not finite</title></path>'


def _polylines(line: Line, scale: Scale, classes: str) -> list[str]:
    """The line in pieces, cut where a value is not finite."""
    pieces: list[list[str]] = [[]]
    for x, y in line:
        if math.isfinite(y):
            pieces[-1].append(f"{scale.x(x):.1f},{scale.y(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    lines = (" ".join(piece) for piece in pieces if len(piece) > 1)
    return [f'<polyline class="line {classes}" points="{points}"/>' for points in lines]


def log_scale(values: Sequence[Number]) -> bool:
    """Whether a logarithmic axis shows these values better: all positive and spread over more than 1 : 30."""
    return min(values) > 0 and max(values) / min(values) > 30


def thin(line: Line, most: int = MOST_POINTS) -> list[tuple[Number, Number]]:
    """At most about `most` points: of each stretch the lowest and highest, so that spikes stay."""
    if len(line) <= most:
        return list(line)
    size = math.ceil(2 * len(line) / most)
    out = []
    for start in range(0, len(line), size):
        stretch = line[start : start + size]
        finite = [p for p in stretch if math.isfinite(p[1])]
        chosen = (
            {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {stretch[0]}
        )
        out += sorted(chosen | {p for p in stretch if not math.isfinite(p[1])})
    return out


def moving_average(line: Line) -> list[tuple[Number, Number]]:
    """Mean over a centred window of a fortieth of the line; values that are not finite are left out."""
    half = max(2, len(line) // 80)
    out = []
    for place, (x, y) in enumerate(line):
        window = [v for _, v in line[max(0, place - half) : place + half + 1] if math.isfinite(v)]
        out.append((x, sum(window) / len(window) if window and math.isfinite(y) else math.nan))
    return out


def _axis(values: Sequence[Number], percent: bool, log: bool) -> tuple[Number, Number, list[Number]]:
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / 5))
        ticks = [10.0**e for e in range(first, last + 1, every)]
        return low / 1.15, high * 1.15, [t for t in ticks if low / 1.15 <= t <= high * 1.15] or [low, high]
    if percent or (low >= 0 and low < 0.4 * high):
        low = min(0.0, low)
    if percent:
        high = min(max(high * 1.08, 1e-3), max(1.0, high))
    if high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    step = nice_step((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, max(high, low + step)
    if not percent or high < 0.97:
        high = math.ceil(high / step - 1e-9) * step
    ticks = [low + i * step for i in range(int((high - low) / step + 1e-6) + 1)]
    return low, high, ticks


def _x_ticks(low: Number, high: Number) -> list[Number]:
    if low == high:
        return [low]
    step = max(1.0, nice_step((high - low) / 5))
    first = math.ceil(low / step)
    return [i * step for i in range(first, int(high // step) + 1)]


def nice_step(rough: Number) -> Number:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def _label(value: Number, percent: bool, *, exact: bool = False) -> str:
    if not percent:
        return short(value)
    digits = 2 if exact and abs(value) < 0.1 else 1 if exact or 0 < abs(value) < 0.01 else 0
    shown = f"{value * 100:.{digits}f}"
    return f"{shown if float(shown) == round(value * 100, 9) or exact else f'{value * 100:.3g}'}%"


def short(value: Number) -> str:
    """A number in few characters: 0.0005 -> 5e-4, 1234567 -> 1.23M, 0.25 -> 0.25."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-2:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"
