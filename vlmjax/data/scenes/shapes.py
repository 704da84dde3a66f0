"""Each shape as a distance field: how far a point is outside (positive) or inside (negative) its edge.

Coordinates are in radii of the thing, y downwards. A distance field gives anti-aliased fills, outlines,
rims and shadows at any size from one formula. Only + - * / and square roots are used on pixels, which every
machine rounds alike.
"""

import functools
import math

import numpy as np

Field = np.ndarray  # float64, one distance per point


def _circle(x: np.ndarray, y: np.ndarray, cx: float, cy: float, radius: float) -> Field:
    return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - radius


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> Field:
    over_x, over_y = np.abs(x) - half_x, np.abs(y) - half_y
    outside = np.sqrt(np.maximum(over_x, 0) ** 2 + np.maximum(over_y, 0) ** 2)
    return outside + np.minimum(np.maximum(over_x, over_y), 0)


def polygon(x: np.ndarray, y: np.ndarray, corners: tuple[tuple[float, float], ...]) -> Field:
    """Exact distance to a simple polygon; the sign is by the even-odd rule."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey != 0:
            crosses = (ay <= y) != (by <= y)
            inside ^= crosses & (px < py * (ex / ey))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


@functools.cache
def _round_corners(number: int, radius: float, start: float) -> tuple[tuple[float, float], ...]:
    turns = [math.radians(start + 360 * k / number) for k in range(number)]
    return tuple((radius * math.cos(t), radius * math.sin(t)) for t in turns)


@functools.cache
def _star_corners(outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    tips, dents = _round_corners(5, outer, -90.0), _round_corners(5, inner, -54.0)
    return tuple(corner for pair in zip(tips, dents, strict=True) for corner in pair)


def _heart(x: np.ndarray, y: np.ndarray) -> Field:
    # Two circles above a triangle.
    left, right = _circle(x, y, -0.44, -0.34, 0.53), _circle(x, y, 0.44, -0.34, 0.53)
    tip = polygon(x, y, ((-0.84, 0.0), (0.84, 0.0), (0.0, 0.9)))
    middle = _circle(x, y, 0.0, 0.0, 0.5)  # fills the seam between the other three
    return np.minimum(np.minimum(left, right), np.minimum(middle, tip))


def _flower(x: np.ndarray, y: np.ndarray) -> Field:
    field = _circle(x, y, 0.0, 0.0, 0.45)
    for cx, cy in _round_corners(6, 0.58, -90.0):
        field = np.minimum(field, _circle(x, y, cx, cy, 0.37))
    return field


_ARROW = ((0.98, 0.0), (0.12, -0.82), (0.12, -0.34), (-0.9, -0.34), (-0.9, 0.34), (0.12, 0.34), (0.12, 0.82))


def field(shape: str, x: np.ndarray, y: np.ndarray) -> Field:
    """Distance of the points `(x, y)` to the edge of `shape`; an arrow points right."""
    if shape == "circle":
        return _circle(x, y, 0.0, 0.0, 0.95)
    if shape == "square":
        return _box(x, y, 0.8, 0.8) - 0.05
    if shape == "triangle":
        return polygon(x, y, ((0.0, -0.92), (0.92, 0.7), (-0.92, 0.7))) - 0.06
    if shape == "star":
        return polygon(x, y, _star_corners(1.06, 0.44)) - 0.03
    if shape == "heart":
        return _heart(x, y) - 0.02
    if shape == "hexagon":
        return polygon(x, y, _round_corners(6, 0.96, 0.0)) - 0.03
    if shape == "cross":
        return np.minimum(_box(x, y, 0.9, 0.3), _box(x, y, 0.3, 0.9)) - 0.04
    if shape == "ring":
        return np.abs(_circle(x, y, 0.0, 0.0, 0.72)) - 0.24
    if shape == "crescent":
        return np.maximum(_circle(x, y, -0.05, 0.0, 0.98), -_circle(x, y, 0.42, -0.1, 0.78))
    if shape == "arrow":
        return polygon(x, y, _ARROW) - 0.03
    if shape == "diamond":
        return polygon(x, y, ((0.0, -1.0), (0.64, 0.0), (0.0, 1.0), (-0.64, 0.0))) - 0.04
    if shape == "flower":
        return _flower(x, y)
    raise ValueError(f"unknown shape {shape!r}")


QUARTER_TURNS = {"": 0, "right": 0, "down": 1, "left": 2, "up": 3}


def turned(x: np.ndarray, y: np.ndarray, direction: str, tilt: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of a thing that points to `direction` and is tilted clockwise."""
    angle = math.radians(tilt)
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = x * cosine + y * sine, y * cosine - x * sine
    for _ in range(QUARTER_TURNS[direction]):
        x, y = y, -x
    return x, y


@functools.cache
def extent(shape: str, direction: str, tilt: int) -> tuple[float, float, float, float]:
    """Tight box `(left, top, right, bottom)` around a shape, in radii from its centre."""
    step = 1 / 128
    axis = np.arange(-1.3 + step / 2, 1.3, step)
    x, y = np.meshgrid(axis, axis)
    inside = field(shape, *turned(x, y, direction, tilt)) <= 0
    columns, rows = axis[inside.any(axis=0)], axis[inside.any(axis=1)]
    edges = (columns[0] - step / 2, rows[0] - step / 2, columns[-1] + step / 2, rows[-1] + step / 2)
    return tuple(float(round(edge, 4)) for edge in edges)
