"""Mixtures of sources: shares, epochs, positions at random, and the next mixture of a run."""

import json

import numpy as np
import pytest

from vlmjax.data import blocks, mixture, plan
from vlmjax.data.mixture import Mixture, Part
from vlmjax.errors import DataError


def _parts(sizes, share=None) -> list[Part]:
    share = share or mixture.shares(sizes)
    return [Part(f"s{i}", f"f{i}", n, share[i], i) for i, n in enumerate(sizes)]


def _of_part(mixed: Mixture, count: int, start: int = 0) -> list[np.ndarray]:
    """What each source supplies to so many positions, in their order, numbered within the source."""
    out = mixed(np.arange(start, start + count))
    ends = np.cumsum([part.size for part in mixed.parts])
    return [
        out[(out >= end - part.size) & (out < end)] - (end - part.size)
        for part, end in zip(mixed.parts, ends, strict=True)
    ]


def test_shares():
    assert mixture.shares([100, 300]) == (0.25, 0.75)
    assert mixture.shares([100, 400], "sqrt") == pytest.approx((1 / 3, 2 / 3))
    assert mixture.shares([1, 9, 90], "equal") == pytest.approx((1 / 3,) * 3)
    assert mixture.shares([7, 9], "equal", (0.7, 0.3)) == pytest.approx((0.7, 0.3))
    assert mixture.shares([100, 300], "size", (3.0, 1.0)) == (0.5, 0.5)
    for sizes, mix, weights, told in [
        ([1], "root", (), "mix='root' is none of size, sqrt, equal"),
        ([1, 2], "size", (1.0,), "1 given for 2 sources"),
        ([1, 2], "size", (1.0, 0.0), "from 0.0001"),
        ([1, 2], "size", (1e308, 1.0), "from 0.0001"),
        ([1, 2], "size", (1.0, float("nan")), "from 0.0001"),
    ]:
        with pytest.raises(DataError, match=told):
            mixture.shares(sizes, mix, weights)


@pytest.mark.parametrize("sizes", [[1], [17], [5, 90], [40, 3, 25]])
def test_mixed_by_size_every_epoch_holds_every_example_once(sizes):
    mixed, total = Mixture(_parts(sizes), 3), sum(sizes)
    epochs = [mixed(np.arange(epoch * total, (epoch + 1) * total)).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    if total > 9:
        assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("share", [(0.7, 0.3), (0.999, 0.001), (0.2, 0.5, 0.3)])
def test_every_source_has_its_share_and_whole_epochs(share):
    sizes = [50, 11, 400][: len(share)]
    mixed = Mixture(_parts(sizes, share), 5)
    taken = _of_part(mixed, 40_000)
    for got, part, wanted in zip(taken, mixed.parts, share, strict=True):
        assert abs(len(got) / 40_000 - wanted) < max(0.05 * wanted, 2e-4)
        for epoch in range(len(got) // part.size):
            one = got[epoch * part.size : (epoch + 1) * part.size]
            np.testing.assert_array_equal(one, plan.permutation(_seed(5, part), epoch, part.size))
    # Evenly: no stretch of 2,000 is far from the share.
    for start in range(0, 40_000, 10_000):
        near = _of_part(mixed, 2_000, start)
        assert abs(len(near[0]) / 2_000 - share[0]) < 0.04


def _seed(seed: int, part: Part) -> int:
    return plan.mix64(seed, part.stream) if part.stream else seed


def test_any_shape_and_place_at_once():
    mixed = Mixture(_parts([30, 70], (0.5, 0.5)), 1)
    whole = mixed(np.arange(5000))
    places = np.array([[4999, 0, 77], [3000, 3000, 1]])
    np.testing.assert_array_equal(mixed(places), whole[places])
    assert mixed(np.array([10**15])).shape == (1,)


def test_rows_of_a_host_are_not_of_one_source():
    """A periodic pattern would give every fourth row, and so a host, one source alone."""
    mixed = Mixture(_parts([3000, 1000], (0.75, 0.25)), 0)
    second = mixed(np.arange(40_000)) >= 3000
    for host in range(4):
        assert abs(second.reshape(-1, 4)[:, host].mean() - 0.25) < 0.05


def test_drawn_counts_what_was_given():
    mixed = Mixture(_parts([13, 50], (0.4, 0.6)), 2)
    for position in (0, 1, 999, 1000, 12_345):
        assert mixed.drawn(position) == [len(one) for one in _of_part(mixed, position)]


def test_the_next_mixture_goes_on_where_sources_were():
    """Another share and a new source from position 2,500 on: known sources repeat nothing and skip nothing."""
    first = Mixture(_parts([400, 900], (0.5, 0.5)), 4)
    first = Mixture.from_state(json.loads(json.dumps(first.state())), 4)
    parts = [Part("s1", "f1", 900, 0.2), Part("new", "f9", 70, 0.3), Part("s0", "f0", 400, 0.5)]
    second = first.followed_by(parts, 2_500)
    assert (second.version, second.start) == (2, 2_500)
    assert [(part.name, part.stream) for part in second.parts] == [("s1", 1), ("new", 2), ("s0", 0)]
    before, after = _of_part(first, 2_500), _of_part(second, 3_000, 2_500)
    for old, new, part in [(before[0], after[2], first.parts[0]), (before[1], after[0], first.parts[1])]:
        joined = np.concatenate([old, new])
        for epoch in range(len(joined) // part.size):
            one = joined[epoch * part.size : (epoch + 1) * part.size]
            np.testing.assert_array_equal(one, plan.permutation(_seed(4, part), epoch, part.size))
    third = second.followed_by([Part("s0", "f0", 400, 1.0)], 6_000)
    assert third.parts[0].drawn == second.drawn(6_000)[2] and third.version == 3


def test_state_is_small():
    """With eight sources of long names, real fingerprints and shares, late in a run."""
    sizes = [10**9 + 7 * i for i in range(8)]
    share = mixture.shares(sizes, "sqrt", tuple(1 / (3 + i) for i in range(8)))
    parts = [
        Part(f"/a/long/path/of/source-{i}.tar", f"{i:012x}", n, share[i], i, drawn=10**10, layout=2**32 - 1)
        for i, n in enumerate(sizes)
    ]
    assert len(json.dumps({"step": 10**6, "seed": 0, "mixture": Mixture(parts, 0, 10**12).state()})) < 1000


def test_another_shuffling_of_the_same_source_is_told_and_skips_to_its_next_epoch():
    """From a bucket shards are shuffled in blocks, at hand as a whole: half of each would repeat some."""
    ends = np.cumsum(np.full(40, 5))
    blocked = Mixture([Part("s", "f", 200, 1.0, ends=ends)], 0)
    whole = Mixture([Part("s", "f", 200, 1.0)], 0)
    saved = Mixture.from_state(json.loads(json.dumps(blocked.state())), 0)
    assert saved.parts[0].layout == blocked.parts[0].layout != 0 == whole.parts[0].layout
    assert "in blocks" in mixture.difference(saved.parts, whole.parts)
    assert saved.followed_by(whole.parts, 130).parts[0].drawn == 200
    assert saved.followed_by(blocked.parts, 130).parts[0].drawn == 130


def test_streams_are_never_used_again():
    first = Mixture(_parts([10, 20]), 0)
    second = first.followed_by([Part("s0", "f0", 10, 1.0)], 30)
    third = second.followed_by([Part("s0", "f0", 10, 0.5), Part("new", "f9", 20, 0.5)], 60)
    assert [part.stream for part in third.parts] == [0, 2]
    with pytest.raises(ValueError, match="position 59 is before this mixture"):
        third(np.array([60, 59]))


def test_twice_the_same_data_is_refused():
    class Source:
        name, fingerprint = "a.tar", "same"

        def __len__(self):
            return 3

    with pytest.raises(DataError, match="a.tar holds the same data as a.tar.*weight"):
        mixture.parts_of([Source(), Source()], (0.5, 0.5))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_block_shuffle_is_a_permutation_that_stays_near(window):
    sizes = np.array([7, 1, 30, 12, 9, 25, 3, 3, 18, 11])
    ends = np.cumsum(sizes)
    order = blocks.Order(int(ends[-1]), 6, ends, window)
    epochs = [order(np.arange(e * order.size, (e + 1) * order.size)) for e in range(3)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(order.size))
        of_block = np.searchsorted(ends, epoch, side="right")
        # A block is open from its first example to its last; at no time are more than a window's open.
        first = {b: np.flatnonzero(of_block == b)[0] for b in range(10)}
        last = {b: np.flatnonzero(of_block == b)[-1] for b in range(10)}
        open_blocks = [sum(first[b] <= at <= last[b] for b in range(10)) for at in range(order.size)]
        assert max(open_blocks) <= window
    whole = blocks.Order(int(ends[-1]), 6, ends, 10)
    np.testing.assert_array_equal(whole(np.arange(119)), plan.permutation(6, 0, 119))
