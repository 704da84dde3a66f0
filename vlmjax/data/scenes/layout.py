"""Where things go: the canvas is cut into regions, one per group, and these into cells, one per thing."""

import functools
from typing import NamedTuple

from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.vocabulary import DIAMETER_UNIT, SIZES

ROOM = 1.08  # a cell is at least this many times as wide as the thing in it, so that neighbours never touch
CENTRE_UNIT = 1 / 64  # centres lie on this grid: a 64-pixel image shows them exactly


class Rect(NamedTuple):
    """A rectangle in shares of the image's side, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Horizontal extent."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Vertical extent."""
        return self.bottom - self.top


def overlap(a: Rect, b: Rect) -> bool:
    """Whether two rectangles share more than an edge."""
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


def on_canvas(rect: Rect) -> bool:
    """Whether the whole rectangle can be seen."""
    return rect.left >= 0 and rect.top >= 0 and rect.right <= 1 and rect.bottom <= 1


def swept(rect: Rect, x: float, y: float) -> Rect:
    """What a rectangle covers on its way by `(x, y)`."""
    return Rect(rect.left + min(x, 0), rect.top + min(y, 0), rect.right + max(x, 0), rect.bottom + max(y, 0))


# For each count: (columns, rows, cells as (column, row)), fractions of a cell allowed.
ARRANGEMENTS: dict[int, tuple[tuple[int, int, tuple[tuple[float, float], ...]], ...]] = {
    1: ((1, 1, ((0, 0),)),),
    2: (
        (2, 1, ((0, 0), (1, 0))),
        (1, 2, ((0, 0), (0, 1))),
        (2, 2, ((0, 0), (1, 1))),
        (2, 2, ((1, 0), (0, 1))),
    ),
    3: (
        (3, 1, ((0, 0), (1, 0), (2, 0))),
        (1, 3, ((0, 0), (0, 1), (0, 2))),
        (2, 2, ((0.5, 0), (0, 1), (1, 1))),
        (2, 2, ((0, 0), (1, 0), (0.5, 1))),
        (3, 3, ((0, 0), (1, 1), (2, 2))),
    ),
    4: ((2, 2, ((0, 0), (1, 0), (0, 1), (1, 1))), (3, 3, ((1, 0), (0, 1), (2, 1), (1, 2)))),
    5: (
        (3, 3, ((0, 0), (2, 0), (1, 1), (0, 2), (2, 2))),
        (3, 2, ((0, 0), (1, 0), (2, 0), (0.5, 1), (1.5, 1))),
        (2, 3, ((0, 0), (1, 0), (0.5, 1), (0, 2), (1, 2))),
    ),
    6: (
        (3, 2, ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))),
        (2, 3, ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))),
        (3, 3, ((1, 0), (0.5, 1), (1.5, 1), (0, 2), (1, 2), (2, 2))),
    ),
}
MOST_PER_GROUP = (6, 5, 3, 2)  # things in a group, by number of groups in the scene


def regions(canvas: Rect, number: int, dice: Dice) -> list[Rect]:
    """Cut `canvas` into `number` (1 to 4) regions, in random order."""
    left, top, right, bottom = canvas
    x, y = (left + right) / 2, (top + bottom) / 2
    west, east = Rect(left, top, x, bottom), Rect(x, top, right, bottom)
    north, south = Rect(left, top, right, y), Rect(left, y, right, bottom)
    quarters = [
        Rect(left, top, x, y),
        Rect(x, top, right, y),
        Rect(left, y, x, bottom),
        Rect(x, y, right, bottom),
    ]
    if number == 1:
        cut = [canvas]
    elif number == 2:
        cut = [west, east] if dice.chance(50) else [north, south]
    elif number == 3:
        a, b, c, d = quarters
        cut = dice.pick(([west, b, d], [east, a, c], [north, c, d], [south, a, b]))
    else:
        cut = quarters
    return dice.shuffled(cut)


def _cell(region: Rect, columns: int, rows: int) -> float:
    return min(region.width / columns, region.height / rows)


@functools.cache
def fitting_sizes(region: Rect, count: int) -> tuple[str, ...]:
    """The size words of which `count` things fit into `region` in some arrangement; empty when none does."""
    cell = max(_cell(region, columns, rows) for columns, rows, _ in ARRANGEMENTS[count])
    return tuple(size for size, levels in SIZES.items() if levels[-1] * DIAMETER_UNIT * ROOM <= cell)


@functools.cache
def fitting_counts(region: Rect, most: int) -> tuple[int, ...]:
    """The counts from 1 to `most` of which at least small things fit into `region`."""
    return tuple(count for count in range(1, most + 1) if fitting_sizes(region, count))


def centres(region: Rect, count: int, diameter: float, dice: Dice) -> list[tuple[float, float]]:
    """Centres of `count` things of `diameter` inside `region`, jittered, on the grid of CENTRE_UNIT."""
    fits = [a for a in ARRANGEMENTS[count] if _cell(region, a[0], a[1]) >= diameter * ROOM]
    columns, rows, cells = dice.pick(fits)
    width, height = region.width / columns, region.height / rows
    # Alone in its region a thing may go anywhere; several keep clear of each other and look like a group.
    loose = 1.0 if count == 1 else 0.5
    slack_x, slack_y = loose * (width - diameter * ROOM) / 2, loose * (height - diameter * ROOM) / 2
    result = []
    for column, row in cells:
        x = region.left + (column + 0.5) * width + slack_x * dice.between(-1.0, 1.0)
        y = region.top + (row + 0.5) * height + slack_y * dice.between(-1.0, 1.0)
        result.append((round(x / CENTRE_UNIT) * CENTRE_UNIT, round(y / CENTRE_UNIT) * CENTRE_UNIT))
    return result
