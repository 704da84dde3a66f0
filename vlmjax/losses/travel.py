"""How the keys of all devices pass by the queries of each: all at once (gather), one after another (ring), or both.

The rows of a batch lie over some mesh axes. Along the axes of `ring` blocks of keys are handed to a neighbour after
each visit; along those of `gather` they are collected first. What a block has accumulated (sums, gradients of its keys)
travels with it and ends where the block is at home.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from vlmjax.sharding.ring import ring_cycle

Tree = Any


@dataclasses.dataclass(frozen=True)
class Route:
    """The way blocks take over a mesh; without a mesh there is one device and no way.

    `cycle` is a Hamiltonian cycle over the positions along the ring axes: each position hands on to the next entry's.
    """

    mesh: Mesh | None = None
    ring: tuple[str, ...] = ()
    gather: tuple[str, ...] = ()
    cycle: tuple[int, ...] = ()
    two_way: bool = (
        False  # halves of a block travel in opposite directions, so that both ways of a link are used
    )

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that the rows of the batch lie over, in the order of the rows."""
        together = (*self.ring, *self.gather)
        return tuple(axis for axis in self.mesh.axis_names if axis in together) if self.mesh else ()

    @property
    def hops(self) -> int:
        """Blocks that pass by a device."""
        return max(len(self.cycle), 1)

    @property
    def gathered(self) -> int:
        """Devices whose rows are collected into one block."""
        return math.prod(self.mesh.shape[axis] for axis in self.gather) if self.mesh else 1

    @property
    def rows(self) -> PartitionSpec:
        """Placement of arrays with a row for each example."""
        return PartitionSpec(self.axes)


def make_route(mesh: Mesh, axes: tuple[str, ...], gather: tuple[str, ...]) -> Route:
    """A route over `axes` that gathers along `gather` and goes round a ring along the others."""
    gather = tuple(axis for axis in axes if axis in gather and mesh.shape[axis] > 1)
    ring = tuple(axis for axis in axes if axis not in gather and mesh.shape[axis] > 1)
    if not ring and not gather:
        return Route()
    cycle = ring_cycle(mesh, ring) if ring else ()
    return Route(mesh, ring, gather, cycle, two_way=not gather and len(cycle) > 2)


def hand_on(route: Route, tree: Tree, direction: int) -> Tree:
    """Every array to the neighbour in a direction, 1 or -1."""
    if not route.cycle:
        return tree
    ahead = zip(route.cycle, (*route.cycle[1:], route.cycle[0]), strict=True)
    pairs = [(a, b) if direction > 0 else (b, a) for a, b in ahead]
    return jax.tree.map(lambda x: lax.ppermute(x, route.ring, pairs), tree)


def visit_all(
    route: Route,
    block: Tree,
    mine: Tree,
    theirs: Callable[[int], Tree],
    visit: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
    collect: Callable[[Tree], Tree],
    join: Callable[[Tree, Tree], Tree],
) -> tuple[Tree, Tree]:
    """Let the blocks of all devices pass by; runs on each device inside a `shard_map`.

    Args:
      block: this device's own keys; leaves [rows, ...] with an even number of rows where `route.two_way`.
      mine: what this device accumulates over all blocks.
      theirs: makes, for a number of rows, what a block accumulates over all devices, empty.
      visit: (mine, block, its accumulator) -> both accumulators, after this block was here.
      collect: of the accumulator of a gathered block, the part that belongs to this device, summed over the group.
      join: the accumulators of one block from two visits into one.

    Returns:
      `mine`, and the accumulator of this device's own block, back home.
    """
    if route.two_way:
        return _two_way(route, block, mine, theirs, visit)
    count = len(jax.tree.leaves(block)[0])

    def hop(_: Array, carry: tuple) -> tuple:
        mine, block, done = carry
        # The accumulator arrives while the block is being visited, and is joined at the end.
        following, done = hand_on(route, block, 1), hand_on(route, done, 1)
        whole = _gather(route, block)
        mine, part = visit(mine, whole, theirs(count * route.gathered))
        return mine, following, join(done, collect(part) if route.gather else part)

    if route.hops == 1:
        mine, part = visit(mine, _gather(route, block), theirs(count * route.gathered))
        return mine, collect(part) if route.gather else part
    mine, _, done = lax.fori_loop(0, route.hops, hop, (mine, block, theirs(count)), unroll=2)
    return mine, hand_on(route, done, 1)


def _two_way(route: Route, block: Tree, mine: Tree, theirs: Callable, visit: Callable) -> tuple[Tree, Tree]:
    """The two halves of every block in opposite directions.

    Each accumulator travels while the other half is being visited, so that a visit can add to it in place.
    """
    half = len(jax.tree.leaves(block)[0]) // 2
    front, back = (
        jax.tree.map(lambda x, part=part: x[part], block) for part in (slice(half), slice(half, None))
    )

    def hop(_: Array, carry: tuple) -> tuple:
        mine, front, front_done, back, back_done = carry
        next_front, next_back = hand_on(route, front, 1), hand_on(route, back, -1)
        back_done = hand_on(route, back_done, -1)
        mine, front_done = visit(mine, front, front_done)
        front_done = hand_on(route, front_done, 1)
        mine, back_done = visit(mine, back, back_done)
        return mine, next_front, front_done, next_back, back_done

    carry = (mine, front, theirs(half), back, theirs(half))
    mine, _, front_done, _, back_done = lax.fori_loop(0, route.hops, hop, carry, unroll=2)
    back_done = hand_on(route, back_done, -1)
    return mine, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), front_done, back_done)


def _gather(route: Route, tree: Tree) -> Tree:
    if not route.gather:
        return tree
    return jax.tree.map(lambda x: lax.all_gather(x, route.gather, tiled=True), tree)


def on_every_device(route: Route, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """The function on every device of the route's mesh, each with its own rows of what it is given."""
    if not route.axes:
        return function
    return jax.shard_map(function, mesh=route.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
