"""Ready-made drawings of one thing at one size in pixels, cached: which share of each pixel it covers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vlmjax.data.scenes import shapes

SHADOW, SHADOW_OFFSET, SHADOW_BLUR = 0.3, (0.07, 0.13), 0.22  # strength; the rest in radii
PERIODS = {
    "small": 0.66,
    "medium": 0.5,
    "large": 0.4,
}  # of textures, in radii: fine, but visible at 64 pixels


class Sprite(NamedTuple):
    """How a patch changes: `patch * keep + first * colour + second * second_colour`, all float32 [h, w]."""

    keep: np.ndarray
    first: np.ndarray
    second: np.ndarray | None


class _Outline(NamedTuple):
    """What all textures share: distance to the shape's edge (`times` samples per pixel) and its shadow's."""

    distance: np.ndarray
    behind: np.ndarray
    times: int


class _Cache:
    """Keeps what was made until it holds `limit` bytes, then starts afresh. Safe to share between threads."""

    def __init__(self, limit: int):
        self._limit, self._held, self._items = limit, 0, {}

    def get(self, key: tuple, make: Callable[..., tuple]) -> tuple:
        found = self._items.get(key)
        if found is None:
            found = make(*key)
            self._held += sum(part.nbytes for part in found if isinstance(part, np.ndarray))
            if self._held > self._limit:
                self._items, self._held = {}, 0
            self._items[key] = found
        return found


# A 64-pixel world fills about a tenth of each.
_sprites, _outlines = _Cache(limit=256 << 20), _Cache(limit=128 << 20)


def sprite(shape: str, direction: str, texture: str, size: str, diameter: float, tilt: int) -> Sprite:
    """The sprite of a thing of `diameter` pixels; its centre is the middle of the patch."""
    return _sprites.get((shape, direction, texture, size, diameter, tilt), _make)


def _covered(distance: np.ndarray, pixels: float) -> np.ndarray:
    """Share of a pixel inside an edge at `distance` radii, when one radius is `pixels` pixels."""
    return np.clip(0.5 - distance * pixels, 0, 1)


def _reduced(weights: np.ndarray, times: int) -> np.ndarray:
    side = weights.shape[0] // times
    return weights.reshape(side, times, side, times).mean(axis=(1, 3)).astype(np.float32)


def _grid(radius: float, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample points of a patch around a thing, in radii from its centre."""
    half = int(radius * 1.36) + 2
    axis = (np.arange(-half * times, half * times) + 0.5) / (radius * times)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _outline(shape: str, direction: str, radius: float, tilt: int) -> _Outline:
    # Distance fields blur thin tips at small sizes: several samples per pixel keep them.
    times = 3 if radius < 8 else 2 if radius < 48 else 1
    distance = shapes.field(shape, *shapes.turned(*_grid(radius, times), direction, tilt))
    x, y = _grid(radius, 1)
    across, down = SHADOW_OFFSET
    behind = shapes.field(shape, *shapes.turned(x - across, y - down, direction, tilt))
    return _Outline(distance.astype(np.float32), behind.astype(np.float32), times)


def _make(shape: str, direction: str, texture: str, size: str, diameter: float, tilt: int) -> Sprite:
    radius = diameter / 2
    distance, behind, times = _outlines.get((shape, direction, radius, tilt), _outline)
    pixels = radius * times
    x, y = _grid(radius, times)
    edge = max(0.22, 1.6 / radius) if texture == "outlined" else max(0.09, 0.9 / radius)
    alpha, inner = _covered(distance, pixels), _covered(distance + edge, pixels)
    light = 1 + 0.07 * np.clip(-(x + 2 * y) / 2, -1, 1)
    if texture == "outlined":
        alpha = alpha - inner
        behind = np.abs(behind + edge / 2) - edge / 2
        shaded = alpha * light
    else:
        # A darker rim sets a thing off from what is behind it.
        shaded = (inner + 0.72 * (alpha - inner)) * light
    ramp = np.clip(0.5 - behind / (2 * SHADOW_BLUR), 0, 1)
    shadow = SHADOW * ramp * ramp * (3 - 2 * ramp)
    keep = ((1 - _reduced(alpha, times)) * (1 - shadow)).astype(np.float32)
    if texture in ("solid", "outlined"):
        return Sprite(keep, _reduced(shaded, times), None)
    u, w = shapes.turned(x, y, direction, tilt)
    pattern = _pattern(texture, u, w, PERIODS[size], pixels) * inner
    return Sprite(keep, _reduced(shaded * (1 - pattern), times), _reduced(shaded * pattern, times))


def _pattern(texture: str, u: np.ndarray, w: np.ndarray, period: float, pixels: float) -> np.ndarray:
    """Share of each pixel that a texture paints in the second colour."""

    def stripes(along: np.ndarray, wide: float) -> np.ndarray:
        phase = along / period
        return _covered((np.abs(phase - np.floor(phase) - 0.5) - wide / 2) * period, pixels)

    if texture == "striped":
        return stripes(0.7071 * (u + w), 0.46)
    if texture == "checkered":
        period *= 1.5
        across, down = stripes(u + period / 4, 0.5), stripes(w + period / 4, 0.5)
        return across + down - 2 * across * down
    if texture == "dotted":
        # Two interleaved square grids make one diagonal grid of dots.
        period *= 1.25
        best = np.full(u.shape, np.inf)
        for shift in (0.0, 0.5):
            a, b = u / period + shift, w / period + shift
            best = np.minimum(best, (a - np.floor(a + 0.5)) ** 2 + (b - np.floor(b + 0.5)) ** 2)
        return _covered((np.sqrt(best) - 0.25) * period, pixels)
    raise ValueError(f"unknown texture {texture!r}")


@functools.lru_cache(maxsize=256)
def card(width: int, height: int) -> Sprite:
    """A white rounded card of `width` x `height` pixels with a soft shadow, centred in its patch."""
    pad = max(2, height // 3)
    x = np.arange(width + 2 * pad) + 0.5 - (width / 2 + pad)
    y = np.arange(height + 2 * pad) + 0.5 - (height / 2 + pad)
    x, y = np.meshgrid(x, y)
    corner = height * 0.22

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        over_x, over_y = np.abs(x) - (width / 2 - corner), np.abs(y) - (height / 2 - corner)
        outside = np.sqrt(np.maximum(over_x, 0) ** 2 + np.maximum(over_y, 0) ** 2)
        return outside + np.minimum(np.maximum(over_x, over_y), 0) - corner

    alpha = np.clip(0.5 - distance(x, y), 0, 1)
    ramp = np.clip(0.5 - distance(x - height * 0.03, y - height * 0.07) / (0.4 * height), 0, 1)
    shadow = SHADOW * ramp * ramp * (3 - 2 * ramp)
    return Sprite(((1 - alpha) * (1 - shadow)).astype(np.float32), alpha.astype(np.float32), None)
