"""Questions about a world with their answers, and things to point to."""

from typing import NamedTuple

from vlmjax.data.scenes import geometry
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.words import RELATIONS, class_name, noun
from vlmjax.data.scenes.world import Group, World

QUESTIONS_PURPOSE, CONVERSATION_PURPOSE = 2, 3
_MOST_ROUNDS = 4


class Question(NamedTuple):
    """`kind` is the skill it needs; `answer` is a few lower-case words."""

    kind: str
    question: str
    answer: str


def questions(world: World) -> tuple[Question, ...]:
    """All kinds of questions that have one clear answer in `world`, for every group they can be about."""
    dice = Dice(world.seed, v.SPLITS.index(world.split), world.index, QUESTIONS_PURPOSE)
    found = _about_groups(world) + _counting(world, dice) + _exists(world, dice)
    found += _where(world, dice) + _compare(world, dice)
    if world.word is not None:
        found.append(Question("word", "What word is written in the picture?", world.word.text))
        found.append(Question("word", "What colour are the letters?", world.word.colour))
    found.append(Question("background", "What colour is the background?", world.background.tone))
    return tuple(found)


def conversation(world: World) -> list[dict[str, str]]:
    """One to four of the questions with their answers, as {"from", "value"}: the turns of a talk about the picture.

    `<image>` stands before or after the first question, as LLaVA draws it (Liu et al. 2023, section 4.2). Kinds of
    questions are drawn first, so that a rare one (a printed word) is asked as often as one that every group gives.
    """
    dice = Dice(world.seed, v.SPLITS.index(world.split), world.index, CONVERSATION_PURPOSE)
    by_kind: dict[str, list[Question]] = {}
    for one in questions(world):
        by_kind.setdefault(one.kind, []).append(one)
    kinds = dice.shuffled(list(by_kind))[: 1 + dice.below(_MOST_ROUNDS)]
    image_first, turns = dice.chance(50), []
    for place, kind in enumerate(kinds):
        asked = dice.pick(by_kind[kind])
        words = asked.question
        if not place:
            words = f"<image>\n{words}" if image_first else f"{words}\n<image>"
        turns += [{"from": "human", "value": words}, {"from": "gpt", "value": asked.answer}]
    return turns


def _names(world: World) -> dict[int, str]:
    """The shortest name that fits one group only, by the group's number; colours are the last resort."""
    shapes = [group.shape for group in world.groups]
    return {k: noun(group, colour=shapes.count(group.shape) > 1) for k, group in enumerate(world.groups)}


def _verb(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _about_groups(world: World) -> list[Question]:
    found = []
    for k, name in _names(world).items():
        group = world.groups[k]
        verb = _verb(group)
        colours, shapes = [[getattr(g, a) for g in world.groups] for a in ("colour", "shape")]
        if shapes.count(group.shape) == 1:
            found.append(Question("colour", f"What colour {verb} the {name}?", group.colour))
        if colours.count(group.colour) == 1:
            thing = "thing" if group.count == 1 else "things"
            found.append(Question("shape", f"What shape {verb} the {group.colour} {thing}?", group.shape))
        found.append(
            Question(
                "texture",
                f"What texture {'does' if group.count == 1 else 'do'} the {name} have?",
                group.texture,
            )
        )
        found.append(Question("size", f"How big {verb} the {name}?", group.size))
        if group.direction:
            does = "does" if group.count == 1 else "do"
            found.append(Question("direction", f"Which way {does} the {name} point?", group.direction))
    return found


def _counting(world: World, dice: Dice) -> list[Question]:
    found = [Question("count", "How many shapes are there?", str(len(world.things)))]
    for shape in dict.fromkeys(group.shape for group in world.groups):
        number = sum(group.count for group in world.groups if group.shape == shape)
        found.append(Question("count", f"How many {v.plural(shape)} are there?", str(number)))
    group = dice.pick(world.groups)
    number = sum(g.count for g in world.groups if g.colour == group.colour)
    found.append(Question("count", f"How many {group.colour} things are there?", str(number)))
    found.append(
        Question("count", f"How many {group.colour} {v.plural(group.shape)} are there?", str(group.count))
    )
    absent = dice.pick([shape for shape in v.SHAPES if all(g.shape != shape for g in world.groups)])
    found.append(Question("count", f"How many {v.plural(absent)} are there?", "0"))
    return found


def _exists(world: World, dice: Dice) -> list[Question]:
    """As many yes as no. Training never names a held-out pair, not even to deny it."""
    present = [(group.shape, group.colour) for group in world.groups]
    pairs = v.PAIRS if world.split == "heldout" else v.SEEN_PAIRS
    # The hard kind of no: a shape and a colour that are both there, in two things.
    mixed = [(s, c) for s, _ in present for _, c in present if (s, c) in pairs and (s, c) not in present]
    other = dice.pick(mixed) if mixed and dice.chance(50) else None
    while other is None or other in present:
        other = dice.pick(pairs)
    found = []
    for (shape, colour), answer in ((dice.pick(present), "yes"), (other, "no")):
        found.append(Question("exists", f"Is there {class_name(shape, colour)}?", answer))
    return found


def _where(world: World, dice: Dice) -> list[Question]:
    found = []
    names = _names(world)
    for k, group in enumerate(world.groups):
        if group.count == 1:
            answer = geometry.place(group.things[0].x, group.things[0].y)
            found.append(Question("where", f"Where is the {names[k]}?", answer))
    for a, b in _couples(world):
        name = geometry.relation(world.groups[a], world.groups[b])
        if name is None:
            continue
        verb = _verb(world.groups[a])
        asked, answer = (name, "yes") if dice.chance(50) else (geometry.INVERSE[name], "no")
        words = RELATIONS[asked][0]
        text = f"{verb.capitalize()} the {names[a]} {words} the {names[b]}?"
        found.append(Question("relation", text, answer))
        words = RELATIONS[name][0]
        if world.groups[a].count == 1 and _alone(world, a, b, name):
            found.append(
                Question(
                    "relation",
                    f"What is {words} the {names[b]}?",
                    class_name(world.groups[a].shape, world.groups[a].colour),
                )
            )
    return found


def _couples(world: World) -> list[tuple[int, int]]:
    numbers = range(len(world.groups))
    return [(a, b) for a in numbers for b in numbers if a < b]


def _alone(world: World, a: int, b: int, name: str) -> bool:
    """Whether `a` is the only group that could be meant by "what is left of b"."""
    here = world.groups[b]
    rest = [group for k, group in enumerate(world.groups) if k not in (a, b)]
    return all(geometry.relation(group, here) not in (name, None) for group in rest)


def _compare(world: World, dice: Dice) -> list[Question]:
    found = []
    names = _names(world)
    order = list(v.SIZES)
    for a, b in _couples(world):
        if dice.chance(50):
            a, b = b, a
        one, two = world.groups[a], world.groups[b]
        if one.size != two.size:
            larger = a if order.index(one.size) > order.index(two.size) else b
            if one.count == two.count == 1:
                text = f"Which is larger, the {names[a]} or the {names[b]}?"
                found.append(Question("compare", text, f"the {names[larger]}"))
        if one.count != two.count:
            text = f"Are there more {_many(one)} than {_many(two)}?"
            found.append(Question("compare", text, "yes" if one.count > two.count else "no"))
        text = f"Do the {names[a]} and the {names[b]} have the same texture?"
        found.append(Question("compare", text, "yes" if one.texture == two.texture else "no"))
    return found


def _many(group: Group) -> str:
    return f"{group.colour} {v.plural(group.shape)}"


class Pointing(NamedTuple):
    """A request and the centres it means, in shares of the side, left to right then top to bottom."""

    query: str
    points: tuple[tuple[float, float], ...]


def pointings(world: World) -> tuple[Pointing, ...]:
    """One request per group and one per shape or colour that several groups share."""
    found = {}
    for group in world.groups:
        found[f"point to the {noun(group)}"] = [group]
    for attribute in ("shape", "colour"):
        for value in dict.fromkeys(getattr(group, attribute) for group in world.groups):
            alike = [group for group in world.groups if getattr(group, attribute) == value]
            if len(alike) > 1:
                name = v.plural(value) if attribute == "shape" else f"{value} things"
                found[f"point to the {name}"] = alike
    return tuple(
        Pointing(query, tuple(sorted((t.x, t.y) for group in groups for t in group.things)))
        for query, groups in found.items()
    )
