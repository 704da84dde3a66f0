"""Sentences about a world: noun phrases and captions, the most complete first."""

from vlmjax.data.scenes import geometry
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.world import Group, World

RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "within"),
    "around": ("around", "surrounding"),
}
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ")
CAPTIONS_PURPOSE = 1  # sentences have dice of their own: another wording never changes a drawing


def noun(
    group: Group, *, colour: bool = True, texture: bool = False, size: bool = False, direction: bool = False
) -> str:
    """What a group is called, without article or number: "small striped red stars".

    "medium" and "solid" go without saying.
    """
    parts = []
    if size and group.size != "medium":
        parts.append(group.size)
    if texture and group.texture != "solid":
        parts.append(group.texture)
    if colour:
        parts.append(group.colour)
    parts.append(group.shape if group.count == 1 else v.plural(group.shape))
    if direction and group.direction:
        parts.append(f"pointing {group.direction}")
    return " ".join(parts)


def counted(group: Group, phrase: str) -> str:
    """`phrase` behind its article or number: "a star", "three stars"."""
    return v.article(phrase) if group.count == 1 else f"{v.COUNTS[group.count]} {phrase}"


def full(group: Group) -> str:
    """Everything about a group: "three small striped red stars"."""
    return counted(group, noun(group, texture=True, size=True, direction=True))


def brief(group: Group) -> str:
    """Number, colour and shape: "three red stars", "an orange heart"."""
    return counted(group, noun(group))


def class_name(shape: str, colour: str) -> str:
    """What one thing of a combination is called in zero-shot classification: "an orange heart"."""
    return v.article(f"{colour} {shape}")


def captions(world: World) -> tuple[str, ...]:
    """Several true sentences about `world`, without repetition, the most complete first."""
    dice = Dice(world.seed, v.SPLITS.index(world.split), world.index, CAPTIONS_PURPOSE)
    found = [
        _complete(world, dice),
        _retold(world, dice),
        dice.pick(OPENINGS) + _listed([brief(group) for group in dice.shuffled(world.groups)]),
        dice.pick(OPENINGS) + brief(world.groups[0]),
        _aside(world, dice),
    ]
    return tuple(dict.fromkeys(found))


def _listed(phrases: list[str]) -> str:
    """Join phrases: "a", "a and b", "a, b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _placed(phrase: str, group: Group) -> str:
    """`phrase` with the group's place on the canvas; the things of a larger group are in several places."""
    return f"{phrase} {geometry.place(*geometry.centre(group))}" if group.count == 1 else phrase


def _related(groups: list[Group], dice: Dice, places: bool) -> str:
    """All groups: the first two by their relation when it is clear, else each with its place.

    `places` says the place of a group that is alone, too.
    """
    phrases = [full(group) for group in groups]
    if len(groups) == 1:
        return _placed(phrases[0], groups[0]) if places else phrases[0]
    name = geometry.relation(groups[0], groups[1])
    if name is None:
        phrases = [_placed(phrase, group) for phrase, group in zip(phrases, groups, strict=True)]
        return _listed(phrases)
    relation = dice.pick(RELATIONS[name])
    if groups[0].direction:
        relation = RELATIONS[name][0]  # "an arrow pointing left right of" would be hard to read
    first = f"{phrases[0]} {relation} {phrases[1]}"
    return _listed([first, *phrases[2:]]) if len(groups) == 2 else f"{first}, with {_listed(phrases[2:])}"


def _complete(world: World, dice: Dice) -> str:
    """Groups with all attributes, relation or place, the printed word and the background."""
    text = _related(list(world.groups), dice, places=True)
    if world.word is not None:
        text += f' and the word "{world.word.text}"'
    return f"{text} on {v.article(world.background.tone)} background"


def _retold(world: World, dice: Dice) -> str:
    """The same from another side: groups in another order, no background."""
    groups = list(world.groups)[::-1]
    if len(groups) > 2 and dice.chance(50):
        groups[0], groups[1] = groups[1], groups[0]
    text = _related(groups, dice, places=False)
    if world.word is not None and dice.chance(50):
        return f'the word "{world.word.text}" with {text}'
    return dice.pick(OPENINGS) + text


def _aside(world: World, dice: Dice) -> str:
    """One detail: texture, size, place, another group, a relation of colours, the word or the background."""
    main = world.groups[0]
    options = [
        counted(main, noun(main, colour=False, texture=True, size=True)),
        f"{brief(main)} on {v.article(world.background.tone)} background",
        _placed(brief(main), main),
    ]
    if main.texture != "solid":
        options.append(counted(main, noun(main, texture=True)))
    for other in world.groups[1:]:
        options.append(brief(other))
        name = geometry.relation(main, other)
        if name is not None:
            relation = dice.pick(RELATIONS[name])
            options.append(f"something {main.colour} {relation} something {other.colour}")
            options.append(f"{brief(main)} {relation} {brief(other)}")
            options.append(
                f"{counted(main, noun(main, colour=False))} {relation} {counted(other, noun(other))}"
            )
    if world.word is not None:
        options += [
            f'the word "{world.word.text}"',
            f'{world.word.colour} letters that say "{world.word.text}"',
        ]
    return dice.pick(options)
