"""Where things are: boxes, places on the canvas, relations between groups. All in shares of the side."""

from dataclasses import replace

from vlmjax.data.scenes import shapes
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.layout import Rect
from vlmjax.data.scenes.world import Group, Thing, World

INVERSE = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}
PLACES = {
    (-1, -1): "in the upper left",
    (0, -1): "at the top",
    (1, -1): "in the upper right",
    (-1, 0): "on the left",
    (0, 0): "in the middle",
    (1, 0): "on the right",
    (-1, 1): "in the lower left",
    (0, 1): "at the bottom",
    (1, 1): "in the lower right",
}


def thing_box(thing: Thing, group: Group) -> Rect:
    """Tight box around a drawn thing, without its shadow."""
    radius = thing.diameter / 2
    left, top, right, bottom = shapes.extent(group.shape, group.direction, thing.tilt)
    return Rect(
        thing.x + left * radius, thing.y + top * radius, thing.x + right * radius, thing.y + bottom * radius
    )


def group_box(group: Group) -> Rect:
    """Tight box around all things of a group."""
    boxes = [thing_box(thing, group) for thing in group.things]
    return Rect(
        min(b.left for b in boxes),
        min(b.top for b in boxes),
        max(b.right for b in boxes),
        max(b.bottom for b in boxes),
    )


def centre(group: Group) -> tuple[float, float]:
    """Mean of the centres of a group's things."""
    number = len(group.things)
    return sum(t.x for t in group.things) / number, sum(t.y for t in group.things) / number


def place(x: float, y: float) -> str:
    """Which ninth of the canvas a point is in, in words."""
    low, high = 0.37, 0.63
    return PLACES[((x > high) - (x < low), (y > high) - (y < low))]


def relation(a: Group, b: Group) -> str | None:
    """Where `a` is as seen from `b`: left, right, above, below, inside, around; None when it is not clear."""
    box_a, box_b = group_box(a), group_box(b)
    for name, outer, inner in (("inside", box_b, box_a), ("around", box_a, box_b)):
        if outer.left < inner.left and inner.right < outer.right:
            if outer.top < inner.top and inner.bottom < outer.bottom:
                return name
    (ax, ay), (bx, by) = centre(a), centre(b)
    across, down = abs(ax - bx), abs(ay - by)
    touch = 0.02  # boxes may overlap by this much
    if across >= 1.5 * down and max(box_b.left - box_a.right, box_a.left - box_b.right) > -touch:
        return "left" if ax < bx else "right"
    if down >= 1.5 * across and max(box_b.top - box_a.bottom, box_a.top - box_b.bottom) > -touch:
        return "above" if ay < by else "below"
    return None


def moved(world: World, t: float) -> World:
    """`world` at time `t` (0 to 1): each group has gone the share `t` of its way."""
    groups = []
    for group in world.groups:
        across, down = v.STEPS.get(group.motion, (0, 0))
        shift_x, shift_y = across * group.reach * t, down * group.reach * t
        things = tuple(replace(thing, x=thing.x + shift_x, y=thing.y + shift_y) for thing in group.things)
        groups.append(replace(group, things=things))
    return replace(world, groups=tuple(groups))
