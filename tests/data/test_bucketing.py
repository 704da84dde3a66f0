"""Token counts of images as transformers has them; buckets and budgets that lose nothing."""

import itertools

import numpy as np
import pytest

from vlmjax.data import bucketing, windows
from vlmjax.errors import DataError


def test_grid_by_hand():
    # 640 x 480 at 28 pixels a token: 22.86 and 17.14; a giant is scaled to the bound, a stamp up to the least.
    assert [int(side) for side in bucketing.image_grid(640, 480)] == [17, 23]
    rows, columns = bucketing.image_grid(np.array([8000, 10, 28]), np.array([4000, 10, 2800]))
    assert (rows * columns * 28 * 28 <= 14 * 14 * 4 * 1280).all() and (rows * columns >= 4).all()
    assert (rows[0], columns[0]) == (25, 50) and (rows[1], columns[1]) == (2, 2)


def test_grid_equals_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(0)
    width, height = rng.integers(28, 5000, (2, 3000))
    for patch, merge, least, most in ((14, 2, 3136, 1003520), (16, 2, 65536, 16777216), (14, 1, 196, 200704)):
        side = patch * merge
        rows, columns = bucketing.image_grid(
            width, height, patch=patch, merge=merge, min_pixels=least, max_pixels=most
        )
        for w, h, row, column in zip(*(a.tolist() for a in (width, height, rows, columns)), strict=True):
            if max(w, h) / min(w, h) < 200 and min(w, h) >= side:
                assert module.smart_resize(h, w, side, least, most) == (row * side, column * side)


def test_every_small_window_of_buckets():
    edges, budget = [1, 2, 4], 8
    for count in range(6):
        for tokens in itertools.product((0, 1, 2, 3, 5), repeat=count):
            made = bucketing.bucket(np.array(tokens, int), edges, budget)
            placed = [int(i) for batch in made.batches for i in batch.examples]
            useless = [i for i, n in enumerate(tokens) if n in (0, 5)]
            assert sorted(placed + made.dropped.tolist()) == list(range(count))
            assert made.dropped.tolist() == useless
            for batch in made.batches:
                assert batch.tokens in edges and batch.size == budget // batch.tokens
                assert 0 < len(batch.examples) <= batch.size
                assert all(tokens[i] <= batch.tokens for i in batch.examples)
            partial = [batch for batch in made.batches if len(batch.examples) < batch.size]
            assert len(partial) <= 1
            for batch in partial:  # in the smallest shape that holds it
                held = [e for e in edges if e >= max(tokens[i] for i in batch.examples)]
                assert batch.tokens == next(e for e in held if budget // e >= len(batch.examples))


def test_sizes_of_batches_and_padding():
    rng = np.random.default_rng(0)
    tokens = rng.integers(16, 1025, 4096)
    made = bucketing.bucket(tokens, [64, 128, 256, 512, 768, 1024], 65536, multiple=8, seed=1)
    sizes = {batch.tokens: batch.size for batch in made.batches}
    assert sizes == {64: 1024, 128: 512, 256: 256, 512: 128, 768: 80, 1024: 64} or set(sizes) < {
        64, 128, 256, 512, 768, 1024
    }  # fmt: skip
    assert all(size % 8 == 0 for size in sizes.values())
    used = sum(tokens[batch.examples].sum() for batch in made.batches)
    assert used / sum(batch.tokens * batch.size for batch in made.batches) > 0.75
    again = bucketing.bucket(tokens, [64, 128, 256, 512, 768, 1024], 65536, multiple=8, seed=2)
    assert [b.tokens for b in made.batches] != [b.tokens for b in again.batches]


def test_buckets_by_step():
    def lengths(window):
        return np.random.default_rng(window).integers(1, 65, 200)

    planned = windows.Windows(lambda w: bucketing.bucket(lengths(w), [16, 32, 64], 512, window=w), 1)
    seen = set()
    for step in range(40):
        ((window, unit, end),) = planned.spans(step)
        batch = planned[window].batches[unit]
        assert end == unit + 1 and planned.place(step) == (step, window, unit)
        seen |= {(window, int(i)) for i in batch.examples}
    assert {(w, i) for w in range(window) for i in range(200)} <= seen and window > 1


def test_flat_sequences_within_a_budget():
    rng = np.random.default_rng(0)
    width, height = rng.integers(100, 1200, (2, 500))
    rows, columns = bucketing.image_grid(width, height)
    tokens = rows * columns
    made = bucketing.within_budget(tokens, 1200, max_images=6)
    assert np.bincount(made.row, made.length).max() <= 1200 and np.bincount(made.row).max() <= 6
    assert sorted([*made.example, *made.dropped]) == list(range(500))
    assert made.dropped.tolist() == np.flatnonzero(tokens > 1200).tolist()
    np.testing.assert_array_equal(made.length, tokens[made.example])


def test_refused():
    for edges in ([], [4, 4], [0, 2], [4, 2]):
        with pytest.raises(DataError, match="are not lengths that increase"):
            bucketing.bucket(np.array([1]), edges, 8)
    with pytest.raises(DataError, match="a budget of 8 tokens has no room for 4 rows of 4"):
        bucketing.bucket(np.array([1]), [2, 4], 8, multiple=4)
