"""Scenes as a source of examples: `scene(...)` makes one, `Scenes(...)` is an endless set of them."""

import dataclasses
import difflib
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data.record import Record
from vlmjax.data.scenes import draw, geometry, questions, words
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.questions import Question
from vlmjax.data.scenes.statements import Statement, statement
from vlmjax.data.scenes.world import World, make_world
from vlmjax.errors import DataError

VERSION = 1  # of the drawn world: raised whenever an index stops meaning the same scene
LENGTHS = {"train": 1_000_000, "val": 1024, "heldout": 1024}  # what len() says: the world does not end there
CAPTIONS = ("all", "complete", "class", "shape", "questions", "statements")  # which texts a record carries
SMALLEST_IMAGE = 16


class Object(NamedTuple):
    """One thing with its attributes; `box` is (left, top, right, bottom) and `centre` (x, y), in pixels."""

    shape: str
    colour: str
    texture: str
    size: str
    direction: str
    motion: str
    group: int
    box: tuple[float, float, float, float]
    centre: tuple[float, float]


class Point(NamedTuple):
    """A request such as "point to the red stars" and the pixels (x, y) it means."""

    query: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Scene:
    """A world at one image size. Everything is worked out when it is first asked for."""

    world: World
    image_size: int

    @functools.cached_property
    def image(self) -> np.ndarray:
        """The drawing: uint8 `[image_size, image_size, 3]`, RGB."""
        return draw.render(self.world, self.image_size)

    @functools.cached_property
    def captions(self) -> tuple[str, ...]:
        """Two to five true sentences, the most complete first, no two equal."""
        return words.captions(self.world)

    @functools.cached_property
    def objects(self) -> tuple[Object, ...]:
        """Every thing, group by group, the main group first."""
        side = self.image_size
        return tuple(
            Object(
                *(
                    group.shape,
                    group.colour,
                    group.texture,
                    group.size,
                    group.direction,
                    group.motion,
                    number,
                ),
                box=tuple(edge * side for edge in geometry.thing_box(thing, group)),
                centre=(thing.x * side, thing.y * side),
            )
            for number, group in enumerate(self.world.groups)
            for thing in group.things
        )

    @property
    def boxes(self) -> np.ndarray:
        """Boxes of `objects`: float32 `[objects, 4]`, (left, top, right, bottom) in pixels."""
        return np.array([thing.box for thing in self.objects], np.float32)

    @functools.cached_property
    def word_box(self) -> tuple[float, float, float, float] | None:
        """Box of the card with the printed word, in pixels, or None."""
        word = self.world.word
        if word is None:
            return None
        width, height = draw.card_size(word, self.image_size)
        x, y = word.x * self.image_size, word.y * self.image_size
        return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    @functools.cached_property
    def qa(self) -> tuple[Question, ...]:
        """Questions with their answers: colour, shape, texture, size, count, exists, where, word, compare."""
        return questions.questions(self.world)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """Some of the questions as a talk of one to four rounds: {"from": "human" or "gpt", "value"}."""
        return questions.conversation(self.world)

    @functools.cached_property
    def points(self) -> tuple[Point, ...]:
        """Requests to point to something, with centres in pixels."""
        side = self.image_size
        return tuple(
            Point(query, tuple((x * side, y * side) for x, y in found))
            for query, found in questions.pointings(self.world)
        )

    @property
    def class_name(self) -> str:
        """The main group as a class: "a red star"."""
        return words.class_name(self.world.groups[0].shape, self.world.groups[0].colour)

    def description(self) -> dict[str, Any]:
        """The whole world as plain dicts, lists, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self.world)


def scene(seed: int, i: int, split: str = "train", *, style: str = "simple", image_size: int = 64) -> Scene:
    """Scene number `i`: a pure function of `(seed, i, split, style)`; `image_size` only scales the drawing.

    Args:
        seed: any integer.
        i: number of the scene, 0 or more.
        split: `train`, `val` (new scenes of the combinations in `train`) or `heldout` (the main thing is a
            combination of shape and colour that the other two never show).
        style: `single`, `simple` or `full`, see `Scenes`.
        image_size: side in pixels.

    Raises:
        DataError: an unknown split or style, or an impossible number.
    """
    _check("split", split, v.SPLITS)
    _check("style", style, v.STYLES)
    if image_size < SMALLEST_IMAGE:
        raise DataError(f"scenes: image_size is {image_size}, at least {SMALLEST_IMAGE} pixels are needed")
    if i < 0:
        raise DataError(f"scenes: scene number {i} is negative, the first one is 0")
    return Scene(make_world(seed, i, split, style), image_size)


def moved(of: Scene, t: float) -> Scene:
    """The frame at time `t` (0 to 1) of a short film that starts with `of`.

    Each group goes its own way, named by `Object.motion`; captions, boxes and answers follow.
    """
    return dataclasses.replace(of, world=geometry.moved(of.world, t))


def _check(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of them"
        raise DataError(f"scenes: unknown {what} {value!r}, expected one of {', '.join(valid)}; {hint}")


@functools.cache
def heldout_classes() -> tuple[str, ...]:
    """The 36 held-out combinations as zero-shot classes ("a red star"); a record's `label` indexes them."""
    return tuple(words.class_name(*pair) for pair in v.HELD_OUT_PAIRS)


@functools.cache
def seen_classes() -> tuple[str, ...]:
    """The 108 combinations of `train` and `val` as classes; a record's `label` indexes them."""
    return tuple(words.class_name(*pair) for pair in v.SEEN_PAIRS)


class Scenes:
    """A source of drawn scenes. Each depends on `(seed, i, split, style)` and is drawn when asked for."""

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        image_size: int = 64,
        *,
        style: str = "simple",
        captions: str | None = None,
        length: int | None = None,
    ):
        """Describe the set; nothing is drawn yet.

        Args:
            split: `train`, `val` or `heldout`.
            seed: another seed is another world.
            image_size: side in pixels.
            style: `single` is one thing; `simple` one or two things of any texture and size, which is what a
                small CLIP learns in minutes; `full` adds counts, up to four groups, printed words and things
                inside things.
            captions: `all`: every caption of a scene, short and long, to train on; `complete`: the fullest
                one, which tells a scene from all others, for retrieval; `class`: the combination of the main
                thing ("a red star"), for zero-shot classification; `shape`: its shape alone ("a star"); `questions`:
                no caption, but a conversation of one to four questions and answers; `statements`: two pictures and a
                sentence about both that is true or false. None is `all` in `train`, else `complete`.
            length: what `len()` says; None is 1,000,000 in `train`, 1,024 in `val` and `heldout`.

        Raises:
            DataError: an unknown split, style or kind of captions, or an impossible number.
        """
        scene(seed, 0, split, style=style, image_size=image_size)  # checks what it is given
        captions = captions or ("all" if split == "train" else "complete")
        _check("captions", captions, CAPTIONS)
        length = LENGTHS[split] if length is None else length
        if length < 1:
            raise DataError(f"scenes: length is {length}, expected at least 1")
        self.split, self.seed, self.image_size, self.style = split, seed, image_size, style
        self.captions, self._length = captions, length
        self._labels = {name: k for k, name in enumerate(self.classes)}

    @property
    def name(self) -> str:
        """What the source is called in logs: `scenes:train:simple:all`."""
        return f"scenes:{self.split}:{self.style}:{self.captions}"

    @property
    def fingerprint(self) -> str:
        """Equal for sources that give equal records."""
        return f"{self.name}:v{VERSION}:seed{self.seed}:{self.image_size}px:{self._length}"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that `label` in a record's `extra` counts."""
        return heldout_classes() if self.split == "heldout" else seen_classes()

    def __len__(self) -> int:
        """The nominal number of scenes."""
        return self._length

    def scene(self, i: int) -> Scene:
        """Scene number `i` with everything known about it."""
        return scene(self.seed, i, self.split, style=self.style, image_size=self.image_size)

    def __getitem__(self, i: int) -> Record:
        """Record number `i`; `extra` holds `label` and `class_name` of the main thing and the whole `scene`.

        And with `captions="questions"` the turns of its `conversations`.

        Raises:
            IndexError: `i` is negative or not below `len()`.
        """
        if not 0 <= i < self._length:
            raise IndexError(f"{self.name}: scene {i} of {self._length}")
        one = self.scene(int(i))
        extra = {"label": self._labels[one.class_name], "class_name": one.class_name, "scene": one}
        if self.captions == "questions":
            extra["conversations"] = one.conversation
        if self.captions == "statements":
            extra |= {"images": (one.image, self._beside(i).image), "label": self._statement(i).truth}
        key = f"scenes/{self.split}/{self.style}/{self.seed}/{i}"
        return Record(key, one.image, self.captions_at(i), extra)

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of record number `i`; nothing is drawn for them."""
        if self.captions == "statements":
            return (self._statement(int(i)).text,)
        return self._captions_of(self.scene(int(i)))

    def _beside(self, i: int) -> Scene:
        """The right picture of a statement: a scene beyond the last record, which is no record's own."""
        return self.scene(self._length + int(i))

    def _statement(self, i: int) -> Statement:
        return statement(self.scene(int(i)).world, self._beside(i).world)

    def turns_at(self, i: int) -> list[dict[str, str]]:
        """The conversation of record number `i`, none unless the set is of questions; nothing is drawn for it."""
        return self.scene(int(i)).conversation if self.captions == "questions" else []

    def _captions_of(self, one: Scene) -> tuple[str, ...]:
        if self.captions == "questions":
            return ()
        if self.captions == "class":
            return (one.class_name,)
        if self.captions == "shape":
            return (v.article(one.world.groups[0].shape),)
        return one.captions if self.captions == "all" else one.captions[:1]


def open_scenes(spec: str, *, seed: int = 0, image_size: int = 64) -> Scenes:
    """Open a spec: `scenes`, then in any order and each at most once a split, a style, a kind of captions.

    `scenes:heldout`, `scenes:train:full`, `scenes:heldout:class`, `scenes:train:questions`, `scenes:val:statements`.

    Raises:
        DataError: a word of the spec is none of them, or two are of one kind.
    """
    kinds = {"split": v.SPLITS, "style": v.STYLES, "captions": CAPTIONS}
    options: dict[str, str] = {}
    for word in spec.split(":")[1:]:
        _check("option", word, tuple(name for names in kinds.values() for name in names))
        kind = next(kind for kind, names in kinds.items() if word in names)
        if kind in options:
            raise DataError(f"{spec!r} says both {options[kind]!r} and {word!r}: give one {kind}")
        options[kind] = word
    return Scenes(**options, seed=seed, image_size=image_size)
