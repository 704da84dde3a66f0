"""The content of a scene: what is where, without a pixel and without a sentence.

A `World` is a pure function of `(seed, index, split, style)`. Lengths are shares of the image's side, so
that the same world can be drawn at any size.
"""

from dataclasses import dataclass, replace

from vlmjax.data.scenes import layout
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.dice import Dice

COUNT_WEIGHTS = (50, 20, 15, 10, 8, 7)  # of groups of one, two, ... six things
REACHES = (0.3, 0.2, 0.1)  # how far a group may move; the first that is clear


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn shape. `group` is its index in `World.groups`; `tilt` is in degrees, clockwise."""

    group: int
    x: float
    y: float
    diameter: float
    tilt: int


@dataclass(frozen=True, slots=True)
class Group:
    """Things that look alike: "three small red stars". `direction` is an arrow's, else empty."""

    shape: str
    colour: str
    texture: str
    size: str
    direction: str
    rgb: tuple[int, int, int]  # the colour with a little variation
    motion: str  # one of MOTIONS: where `moved` takes it, over a clear stretch
    reach: float  # how far it goes from t = 0 to t = 1
    things: tuple[Thing, ...]

    @property
    def count(self) -> int:
        """How many things are in the group."""
        return len(self.things)


@dataclass(frozen=True, slots=True)
class Word:
    """A printed word on a white card; `x`, `y` is the centre, `height` the card's."""

    text: str
    colour: str
    x: float
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Background:
    """Two ends of a soft tone, blended by a pattern; `turn` (0 to 7) is one of its eight symmetries."""

    tone: str
    pattern: str
    turn: int


@dataclass(frozen=True, slots=True)
class World:
    """Everything in one scene. `groups[0]` is the main one, held out exactly when the split is."""

    seed: int
    index: int
    split: str
    style: str
    groups: tuple[Group, ...]
    word: Word | None
    background: Background

    @property
    def things(self) -> tuple[Thing, ...]:
        """All things of all groups, in drawing order."""
        return tuple(thing for group in self.groups for thing in group.things)


def _stream(split: str, style: str) -> int:
    return v.SPLITS.index(split) + 16 * v.STYLES.index(style)


def _pairs(number: int, split: str, dice: Dice) -> list[tuple[str, str]]:
    """`number` distinct (shape, colour) pairs; in `heldout` the first one, and only that one, is held out."""
    pairs = [dice.pick(v.HELD_OUT_PAIRS if split == "heldout" else v.SEEN_PAIRS)]
    while len(pairs) < number:
        pair = dice.pick(v.SEEN_PAIRS)
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def _jitter(colour: str, dice: Dice) -> tuple[int, int, int]:
    red, green, blue = v.COLOURS[colour]
    spread = 17
    shift = spread // 2
    return (
        min(255, max(0, red + dice.below(spread) - shift)),
        min(255, max(0, green + dice.below(spread) - shift)),
        min(255, max(0, blue + dice.below(spread) - shift)),
    )


def _texture(shape: str, style: str, dice: Dice) -> str:
    texture = dice.pick_weighted(
        v.TEXTURES, (40, 15, 15, 15, 15) if style == "full" else (60, 10, 10, 10, 10)
    )
    # A ring is an outline already.
    return "solid" if shape == "ring" and texture == "outlined" else texture


def _size(region: layout.Rect, count: int, style: str, dice: Dice) -> str:
    sizes = layout.fitting_sizes(region, count)
    if style == "full":
        return dice.pick(sizes)
    # At 64 pixels the shape of a small thing is hard to make out: the easier styles have fewer of them.
    return dice.pick_weighted(sizes, (1, 2, 3)[: len(sizes)])


def _group(
    number: int, pair: tuple[str, str], region: layout.Rect, most: int, style: str, dice: Dice
) -> Group:
    count = 1
    if most > 1:
        counts = layout.fitting_counts(region, most)
        count = dice.pick_weighted(counts, [COUNT_WEIGHTS[n - 1] for n in counts])
    size = _size(region, count, style, dice)
    shape, colour = pair
    diameter = dice.pick(v.SIZES[size]) * v.DIAMETER_UNIT
    things = tuple(
        Thing(number, x, y, diameter, dice.pick(v.TILTS))
        for x, y in layout.centres(region, count, diameter, dice)
    )
    return Group(
        shape=shape,
        colour=colour,
        texture=_texture(shape, style, dice),
        size=size,
        direction=dice.pick(v.DIRECTIONS) if shape == "arrow" else "",
        rgb=_jitter(colour, dice),
        motion="still",
        reach=0.0,
        things=things,
    )


def _nested(outer: Group, inner: Group) -> tuple[Group, Group]:
    """Make `outer` a large frame with a small `inner` in its middle."""
    frame = outer.things[0]
    size = v.SIZES["small"][0] * v.DIAMETER_UNIT
    inside = replace(inner.things[0], x=frame.x, y=frame.y, diameter=size)
    texture = outer.texture if outer.texture in ("solid", "outlined") else "solid"
    return replace(outer, texture=texture), replace(inner, size="small", things=(inside,))


def _can_hold(outer: Group, inner: Group) -> bool:
    return (
        outer.shape in ("circle", "square", "hexagon")
        and outer.size == "large"
        and outer.count == inner.count == 1
        and inner.colour in v.CONTRASTING_COLOURS[outer.colour]
    )


def _bounds(group: Group) -> layout.Rect:
    """A box around a group that does not depend on shapes."""
    radius = 1.15 * group.things[0].diameter / 2  # tips and tilted corners reach beyond the radius
    xs, ys = [t.x for t in group.things], [t.y for t in group.things]
    return layout.Rect(min(xs) - radius, min(ys) - radius, max(xs) + radius, max(ys) + radius)


def _in_motion(groups: list[Group], word: Word | None, dice: Dice) -> list[Group]:
    """Give each group a direction in which nothing is in its way, or none."""
    taken = [_bounds(group) for group in groups]
    if word is not None:
        taken.append(layout.Rect(0, word.y - word.height / 2, 1, word.y + word.height / 2))
    result = list(groups)
    for k, group in enumerate(groups):
        if dice.chance(20):
            continue
        others = taken[:k] + taken[k + 1 :]
        for motion in dice.shuffled(v.MOTIONS[1:]):
            reach = _clear(taken[k], v.STEPS[motion], others)
            if reach:
                across, down = v.STEPS[motion]
                taken[k] = layout.swept(taken[k], across * reach, down * reach)
                result[k] = replace(group, motion=motion, reach=reach)
                break
    return result


def _clear(box: layout.Rect, step: tuple[int, int], others: list[layout.Rect]) -> float:
    """How far `box` can go along `step` on the canvas and past no other box: one of REACHES, or 0."""
    for reach in REACHES:
        swept = layout.swept(box, step[0] * reach, step[1] * reach)
        if layout.on_canvas(swept) and not any(layout.overlap(swept, other) for other in others):
            return reach
    return 0.0


def _word(dice: Dice) -> tuple[Word | None, layout.Rect]:
    """Perhaps a word, and what it leaves of the canvas."""
    margin = 0.02
    if not dice.chance(35):
        return None, layout.Rect(margin, margin, 1 - margin, 1 - margin)
    top = dice.chance(50)
    height = 0.2
    x = 0.5 + dice.between(-0.1, 0.1)
    y = (margin + height / 2 + 0.01) if top else (1 - margin - height / 2 - 0.01)
    word = Word(dice.pick(v.WORDS), dice.pick(v.WORD_COLOURS), x, y, height)
    edges = (height + 0.04, 1 - margin) if top else (margin, 1 - height - 0.04)
    return word, layout.Rect(margin, edges[0], 1 - margin, edges[1])


def _background(groups: list[Group], dice: Dice) -> Background:
    fitting = v.CONTRASTING_TONES[groups[0].colour]
    for group in groups[1:]:
        fitting = fitting & v.CONTRASTING_TONES[group.colour]
    # A set has no order of its own that holds across machines.
    return Background(
        dice.pick([tone for tone in v.TONES if tone in fitting]), dice.pick(v.PATTERNS), dice.below(8)
    )


def make_world(seed: int, index: int, split: str, style: str) -> World:
    """The world number `index`; equal arguments give equal worlds on every machine.

    Args:
        seed: any integer; another seed is another infinite sequence of worlds.
        index: number of the world, from 0 to 2**64 - 1.
        split: one of `SPLITS`.
        style: `single` (one thing), `simple` (one or two things), `full` (up to four groups, counts, a word,
            things inside things).
    """
    dice = Dice(seed, _stream(split, style), index)
    margin = 0.02
    word, canvas = None, layout.Rect(margin, margin, 1 - margin, 1 - margin)
    if style == "full":
        word, canvas = _word(dice)
        number = dice.pick_weighted((1, 2, 3, 4), (25, 40, 20, 15))
    else:
        number = 2 if style == "simple" and dice.chance(65) else 1
    most = layout.MOST_PER_GROUP[number - 1] if style == "full" else 1
    pairs = _pairs(number, split, dice)
    cut = layout.regions(canvas, number, dice)
    groups = [_group(k, pair, cut[k], most, style, dice) for k, pair in enumerate(pairs)]
    if style == "full" and number == 2:
        for outer, inner in ((0, 1), (1, 0)):
            if _can_hold(groups[outer], groups[inner]) and dice.chance(60):
                groups[outer], groups[inner] = _nested(groups[outer], groups[inner])
                break
    background = _background(groups, dice)
    return World(seed, index, split, style, tuple(_in_motion(groups, word, dice)), word, background)
