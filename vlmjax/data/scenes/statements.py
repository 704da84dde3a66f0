"""Statements about two worlds side by side, half of them true, as in NLVR2."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.words import class_name
from vlmjax.data.scenes.world import World

STATEMENTS_PURPOSE = 4
SIDES = ("left", "right")
Pair = tuple[str, str]  # shape and colour


class Statement(NamedTuple):
    """A sentence about a left and a right picture, and whether it is true."""

    text: str
    truth: bool


def statement(left: World, right: World) -> Statement:
    """One statement about two worlds of one split: about one side, about both, or about either.

    A false one about a side names what is on the other side in half of the cases, so that it takes a look at the
    right picture to tell. Training never names a held-out pair.
    """
    dice = Dice(left.seed, v.SPLITS.index(left.split), left.index, STATEMENTS_PURPOSE)
    shown = [_pairs(world) for world in (left, right)]
    wanted = dice.chance(50)
    makers: tuple[Callable[..., Statement | None], ...] = (_side, _side, _either, _colour_of_both)
    kind = dice.pick(makers)
    # What cannot be said of these two, such as a colour that both share, is said of one side instead.
    return kind(shown, wanted, left.split, dice) or _side(shown, wanted, left.split, dice)


def _pairs(world: World) -> list[Pair]:
    return list(dict.fromkeys((group.shape, group.colour) for group in world.groups))


def _side(shown: Sequence[list[Pair]], wanted: bool, split: str, dice: Dice) -> Statement:
    side = dice.below(2)
    here, there = shown[side], shown[1 - side]
    if wanted:
        named = dice.pick(here)
    else:
        elsewhere = [pair for pair in there if pair not in here]
        hard = elsewhere and dice.chance(50)
        named = dice.pick(elsewhere) if hard else _absent([here], split, dice)
    return Statement(f"The {SIDES[side]} picture shows {class_name(*named)}.", wanted)


def _either(shown: Sequence[list[Pair]], wanted: bool, split: str, dice: Dice) -> Statement:
    named = dice.pick(shown[dice.below(2)]) if wanted else _absent(shown, split, dice)
    return Statement(f"One of the pictures shows {class_name(*named)}.", wanted)


def _colour_of_both(shown: Sequence[list[Pair]], wanted: bool, split: str, dice: Dice) -> Statement | None:
    colours = [{colour for _, colour in pairs} for pairs in shown]
    fitting = [one for one in v.COLOURS if all(one in some for some in colours) == wanted]
    # A colour of neither picture would be told from one look.
    fitting = [one for one in fitting if any(one in some for some in colours)]
    if not fitting:
        return None
    return Statement(f"Both pictures show something {dice.pick(fitting)}.", wanted)


def _absent(shown: Sequence[list[Pair]], split: str, dice: Dice) -> Pair:
    pairs = v.PAIRS if split == "heldout" else v.SEEN_PAIRS
    while (named := dice.pick(pairs)) in (pair for some in shown for pair in some):
        pass
    return named
