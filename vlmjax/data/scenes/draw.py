"""From a world to pixels, at any size: a background, then the sprites from the largest to the smallest."""

import functools

import numpy as np
from PIL import ImageFont, features

from vlmjax.data.scenes import sprites
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.world import Background, Group, Word, World
from vlmjax.errors import DataError

LETTERS_PER_CARD = 0.74  # font size as a share of a card's height
TEXT_SAMPLES = 4  # letters are drawn this many times larger and averaged down, so hinting does not matter


def render(world: World, image_size: int) -> np.ndarray:
    """Draw `world` as uint8 `[image_size, image_size, 3]`, RGB, anti-aliased."""
    canvas = background(world.background, image_size)
    drawn = [(thing, group) for group in world.groups for thing in group.things]
    # Larger first: what lies inside a frame stays visible.
    for thing, group in sorted(drawn, key=lambda pair: -pair[0].diameter):
        piece = sprites.sprite(
            group.shape, group.direction, group.texture, group.size, thing.diameter * image_size, thing.tilt
        )
        second = second_colour(group) if piece.second is not None else None
        _stamp(canvas, piece, thing.x * image_size, thing.y * image_size, group.rgb, second)
    if world.word is not None:
        _print(canvas, world.word, image_size)
    pixels = np.clip(canvas, 0, 255, out=canvas)
    pixels += 0.5
    return np.ascontiguousarray(pixels.transpose(1, 2, 0), dtype=np.uint8)


def second_colour(group: Group) -> tuple[int, int, int]:
    """Colour of a group's stripes, dots or checks."""
    return v.SECOND_COLOUR.get(group.colour, v.CREAM)


def _channels(rgb: tuple[int, int, int]) -> np.ndarray:
    return np.array(rgb, np.float32)[:, None, None]


def _stamp(
    canvas: np.ndarray,
    piece: sprites.Sprite,
    x: float,
    y: float,
    colour: tuple[int, int, int],
    second: tuple[int, int, int] | None = None,
) -> None:
    """Put `piece` on `canvas` [3, size, size] with its middle at `(x, y)`; what sticks out is cut off."""
    keep, first, other = piece
    height, width = keep.shape
    left, top = int(x + 0.5) - width // 2, int(y + 0.5) - height // 2
    size = canvas.shape[1]
    if left < 0 or top < 0 or left + width > size or top + height > size:
        rows = slice(max(0, -top), min(height, size - top))
        columns = slice(max(0, -left), min(width, size - left))
        keep, first = keep[rows, columns], first[rows, columns]
        other = None if other is None else other[rows, columns]
        left, top = max(0, left), max(0, top)
    patch = canvas[:, top : top + keep.shape[0], left : left + keep.shape[1]]
    patch *= keep
    patch += _channels(colour) * first
    if other is not None:
        patch += _channels(second) * other


def background(of: Background, size: int) -> np.ndarray:
    """Float32 `[3, size, size]`: the two ends of the tone blended by the pattern, turned or mirrored."""
    blend = _blend(of.pattern, size)
    if of.turn & 1:
        blend = blend.T
    if of.turn & 2:
        blend = blend[::-1]
    if of.turn & 4:
        blend = blend[:, ::-1]
    low, high = v.TONES[of.tone]
    base = _channels(low)
    return base + (_channels(high) - base) * blend


@functools.lru_cache(maxsize=64)
def _blend(pattern: str, size: int) -> np.ndarray:
    """Weights from 0 to 1 of a tone's second end, float32 `[size, size]`."""
    axis = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    if pattern == "linear":
        weights = 0.75 * y + 0.25 * x
    elif pattern == "glow":
        weights = np.clip(1.4 * ((x - 0.38) ** 2 + (y - 0.34) ** 2), 0, 1)
    elif pattern == "waves":
        phase = 3.2 * (y + 0.06 * _ripple(1.6 * x))
        weights = 0.25 * (1 + _ripple(phase)) + 0.5 * y
    elif pattern == "bands":
        step = np.floor(5 * (0.6 * x + 0.8 * y))
        weights = step / 7
        edge = 5 * (0.6 * x + 0.8 * y) - step
        weights = weights + np.clip((edge - 1) * size / 7 + 1, 0, 1) / 7
    elif pattern == "dunes":
        weights = np.zeros_like(x)
        for level, height in ((0.3, 0.34), (0.6, 0.62), (1.0, 0.84)):
            line = height + 0.07 * _ripple(1.1 * x + 2.3 * height)
            weights = np.maximum(weights, level * np.clip((y - line) * size + 0.5, 0, 1))
    else:
        weights = _noise(x, y, 3 if pattern == "clouds" else 6, 0 if pattern == "clouds" else 1)
    return np.ascontiguousarray(np.clip(weights, 0, 1), dtype=np.float32)


def _ripple(phase: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 between -1 and 1, of parabolas."""
    part = 2 * (phase - np.floor(phase)) - 1
    return 4 * part * (1 - np.abs(part))


def _noise(x: np.ndarray, y: np.ndarray, cells: int, number: int) -> np.ndarray:
    """Smooth noise: random heights on a lattice of `cells`, blended between."""
    dice = Dice(0, 255, number)
    lattice = np.array([[dice.between(0.0, 1.0) for _ in range(cells + 2)] for _ in range(cells + 2)])
    column, row = np.floor(x * cells).astype(int), np.floor(y * cells).astype(int)
    a, b = x * cells - column, y * cells - row
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    top = lattice[row, column] * (1 - a) + lattice[row, column + 1] * a
    bottom = lattice[row + 1, column] * (1 - a) + lattice[row + 1, column + 1] * a
    return top * (1 - b) + bottom * b


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    if not features.check("freetype2"):
        raise DataError("scenes print words, which needs Pillow with FreeType: install Pillow from its wheel")
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=1024)
def _letters(text: str, size: int) -> np.ndarray:
    """Coverage of the letters of `text` at font size `size` pixels, cut to the ink, with even sides."""
    mask = _font(size * TEXT_SAMPLES).getmask(text, mode="L")
    ink = np.asarray(mask, np.float32).reshape(mask.size[1], mask.size[0]) / 255
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cell = 2 * TEXT_SAMPLES
    height, width = -(-ink.shape[0] // cell) * cell, -(-ink.shape[1] // cell) * cell
    above, before = (height - ink.shape[0]) // 2, (width - ink.shape[1]) // 2
    padded = np.zeros((height, width), np.float32)
    padded[above : above + ink.shape[0], before : before + ink.shape[1]] = ink
    times = TEXT_SAMPLES
    return padded.reshape(height // times, times, width // times, times).mean(axis=(1, 3))


def card_size(word: Word, image_size: int) -> tuple[int, int]:
    """Width and height in pixels, both even, of the card a word is printed on."""
    height = 2 * round(word.height * image_size / 2)
    letters = _letters(word.text, max(4, round(height * LETTERS_PER_CARD)))
    return letters.shape[1] + 2 * round(height * 0.22), height


def _print(canvas: np.ndarray, word: Word, image_size: int) -> None:
    width, height = card_size(word, image_size)
    letters = _letters(word.text, max(4, round(height * LETTERS_PER_CARD)))
    x, y = word.x * image_size, word.y * image_size
    _stamp(canvas, sprites.card(width, height), x, y, v.COLOURS["white"])
    _stamp(canvas, sprites.Sprite(1 - letters, letters, None), x, y, v.COLOURS[word.colour])
