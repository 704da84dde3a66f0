"""Batches of images of like size for models that take them at their own: token counts, buckets, budgets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data import packing, plan
from vlmjax.errors import DataError


def image_grid(
    width: np.ndarray | int,
    height: np.ndarray | int,
    *,
    patch: int = 14,
    merge: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 14 * 14 * 4 * 1280,
) -> tuple[np.ndarray, np.ndarray]:
    """The grid of tokens a picture becomes when it keeps its shape (Qwen2-VL, section 2.1, and its image processor).

    Sides are rounded to whole tokens of patch * merge pixels, and the picture is scaled, shape kept, when that would
    leave it outside [min_pixels, max_pixels]. The picture is then resized to (rows, columns) * patch * merge.

    Args:
        width, height: pixels, int or int [n].
        patch: pixels of a patch's side.
        merge: patches of a token's side.
        min_pixels, max_pixels: bounds on width times height after rounding.

    Returns:
        (rows, columns) of tokens, int64 of the shape of `width`. Tokens are rows * columns, patches that times merge².
    """
    side = patch * merge
    width, height = np.asarray(width, np.float64), np.asarray(height, np.float64)
    columns = np.maximum(1, np.round(width / side))
    rows = np.maximum(1, np.round(height / side))
    area = rows * columns * side * side
    # By how much the picture's sides exceed those of one with the bounding area.
    large, small = np.sqrt(height * width / max_pixels), np.sqrt(min_pixels / (height * width))
    rows, columns = (
        np.where(
            area > max_pixels,
            np.maximum(1, np.floor(length / large / side)),
            np.where(area < min_pixels, np.ceil(length * small / side), plain),
        )
        for length, plain in ((height, rows), (width, columns))
    )
    return rows.astype(np.int64), columns.astype(np.int64)


class Batch(NamedTuple):
    """Examples of one window that go together, each padded to `tokens`; `size` rows, of which the last may be empty."""

    tokens: int
    size: int
    examples: np.ndarray


class Buckets(NamedTuple):
    """The batches of one window, in the order of training, and the examples of no length or above every bucket."""

    batches: list[Batch]
    dropped: np.ndarray

    @property
    def rows(self) -> int:
        """How many batches there are: the unit that `windows.Windows` counts."""
        return len(self.batches)


def bucket(
    tokens: np.ndarray,
    edges: Sequence[int],
    budget: int,
    *,
    multiple: int = 1,
    seed: int = 0,
    window: int = 0,
) -> Buckets:
    """Group the examples of a window into batches of equal padded length and nearly equal cost.

    An example goes to the smallest edge that holds it; a batch of edge e has budget // e rows, so a step costs the
    same whatever its shape, and there is one compiled shape per edge. What fills no batch of its edge moves up to the
    next, so at most one batch of a window is not full: none is lost, and only that one has empty rows. A pure
    function; batches come in an order shuffled by (seed, window).

    Args:
        tokens: of each example, int [n]; 0 marks an example known to be useless.
        edges: lengths that examples are padded to, increasing.
        budget: tokens of a batch.
        multiple: of which every batch size is one: the number of devices.

    Raises:
        DataError: edges that do not increase, or a budget with no room for `multiple` rows of the last edge.
    """
    edges, tokens = list(edges), np.asarray(tokens, np.int64)
    if not edges or edges[0] < 1 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise DataError(f"edges={edges} are not lengths that increase")
    sizes = [budget // edge // multiple * multiple for edge in edges]
    if not sizes[-1]:
        raise DataError(f"a budget of {budget} tokens has no room for {multiple} rows of {edges[-1]}")
    which = np.searchsorted(edges, tokens)
    useless = (tokens <= 0) | (which == len(edges))
    batches, waiting = fill(tokens, np.flatnonzero(~useless), edges, sizes)
    if len(waiting):
        batches.append(_last(tokens, waiting, edges, sizes))
    order = plan.permutation(seed, window, len(batches)) if batches else []
    return Buckets([batches[i] for i in order], np.flatnonzero(useless))


def fill(
    tokens: np.ndarray, examples: np.ndarray, edges: Sequence[int], sizes: Sequence[int]
) -> tuple[list[Batch], np.ndarray]:
    """Full batches of some examples, by the smallest edge that holds each, and the examples that fill none.

    What fills no batch of its edge moves up to the next. Arguments as of `bucket`, with the rows of each edge's batch.
    """
    which = np.searchsorted(edges, tokens[examples])
    batches, waiting = [], np.zeros(0, np.int64)
    for number, (edge, size) in enumerate(zip(edges, sizes, strict=True)):
        waiting = np.sort(np.concatenate([waiting, examples[which == number]]))
        full = len(waiting) // size * size
        batches += [Batch(edge, size, waiting[at : at + size]) for at in range(0, full, size)]
        waiting = waiting[full:]
    return batches, waiting


def _last(tokens: np.ndarray, waiting: np.ndarray, edges: list[int], sizes: list[int]) -> Batch:
    """What filled no batch, in the smallest shape that holds it."""
    longest = int(tokens[waiting].max())
    number = next(i for i, edge in enumerate(edges) if edge >= longest)
    fits = [i for i in range(number, len(edges)) if sizes[i] >= len(waiting)]
    return Batch(edges[fits[0]], sizes[fits[0]], waiting)


def within_budget(
    tokens: np.ndarray, budget: int, *, max_images: int | None = None, seed: int = 0, window: int = 0
) -> packing.Packing:
    """Images whose tokens together fit a budget, as one flat sequence each (NaViT): `packing.pack` with its bounds.

    Images above the budget are dropped: an image cannot be cut; scale it by `image_grid`'s `max_pixels`.
    """
    return packing.pack(tokens, budget, too_long="drop", max_count=max_images, seed=seed, window=window)
