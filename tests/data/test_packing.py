"""Packing: nothing lost, nothing twice, nothing overlapping, the same on every host and from every saved place."""

import itertools
import json

import numpy as np
import pytest

from vlmjax.data import packing, plan, windows
from vlmjax.errors import DataError


def best_fit_decreasing(lengths, capacity: int) -> list[int]:
    """How full each row gets, by looking at every row for every example."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, used in enumerate(rows) if used + length <= capacity]
        if fitting:
            rows[max(fitting, key=lambda place: rows[place])] += length
        else:
            rows.append(length)
    return sorted(rows)


def check(packed: packing.Packing, lengths, capacity: int, dropped=()) -> None:
    """Draw every token into a grid: each example exactly once, whole, in one row, side by side from 0."""
    grid = np.full((packed.rows, capacity), -1)
    for example, row, start, length in zip(*packed[:4], strict=True):
        assert (grid[row, start : start + length] == -1).all() and start + length <= capacity
        grid[row, start : start + length] = example
        assert length == min(lengths[example], capacity)
    assert sorted([*packed.example.tolist(), *dropped]) == list(range(len(lengths)))
    assert packed.dropped.tolist() == sorted(dropped)
    for row in range(packed.rows):
        used = grid[row][grid[row] >= 0]
        assert len(used) and (grid[row][: len(used)] >= 0).all(), "rows begin at 0 and have no holes"
        here = slice(packed.offsets[row], packed.offsets[row + 1])
        assert (packed.row[here] == row).all() and list(dict.fromkeys(used)) == packed.example[here].tolist()
        assert (np.diff(packed.example[here]) > 0).all()


def test_every_small_case():
    for capacity in (1, 4):
        for count in range(6):
            for lengths in itertools.product(range(6 if count < 4 else 4), repeat=count):
                packed = packing.pack(np.array(lengths, int), capacity)
                zero = [i for i, length in enumerate(lengths) if not length]
                check(packed, lengths, capacity, zero)
                cut = [min(length, capacity) for length in lengths if length]
                found = sorted(np.bincount(packed.row, packed.length).astype(int).tolist()) if cut else []
                assert found == best_fit_decreasing(cut, capacity)
                assert packed.truncated.tolist() == [i for i, n in enumerate(lengths) if n > capacity]


def test_random_windows_and_rules():
    rng = np.random.default_rng(0)
    for _ in range(40):
        capacity = int(rng.integers(20, 400))
        lengths = rng.integers(0, int(capacity * 1.2), 300)
        none, long = np.flatnonzero(lengths == 0).tolist(), np.flatnonzero(lengths > capacity).tolist()
        check(packing.pack(lengths, capacity), lengths, capacity, none)
        dropping = packing.pack(lengths, capacity, too_long="drop")
        check(dropping, lengths, capacity, sorted(none + long))
        assert len(dropping.truncated) == 0
        counts, most = rng.integers(0, 5, 300), int(rng.integers(4, 9))
        bounded = packing.pack(lengths, capacity, counts=counts, max_count=most)
        check(bounded, lengths, capacity, none)
        assert np.bincount(bounded.row, counts[bounded.example]).max() <= most
        ones = packing.pack(lengths, capacity, max_count=2)
        assert np.bincount(ones.row).max() <= 2
        assert packing.pack(lengths, capacity, max_count=300).rows == packing.pack(lengths, capacity).rows


def test_rows_are_shuffled_and_well_filled():
    lengths = np.random.default_rng(1).integers(5, 60, 4096)
    for size, share in ((64, 0.955), (256, 0.986), (4096, 0.997)):
        rows = sum(packing.pack(lengths[at : at + size], 128).rows for at in range(0, 4096, size))
        assert lengths.sum() / (rows * 128) >= share
    one, other = packing.pack(lengths, 128, seed=3), packing.pack(lengths, 128, seed=3, window=1)
    assert one.rows == other.rows and one.example.tolist() != other.example.tolist()
    # Best fit would give the longest examples the first rows.
    first, last = np.split(one.row, 2)[0], one.length
    assert abs(last[: len(first)].mean() - last[len(first) :].mean()) < 2


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([3, -1], {}, "example 1 has a length of -1"),
        ([3, 9], {"too_long": "error"}, "example 1 has 9 tokens, a row has room for 8"),
        ([3], {"too_long": "cut"}, "too_long='cut'"),
        ([3, 3], {"counts": np.array([1, 5]), "max_count": 4}, "example 1 counts 5"),
    ],
)
def test_refused(lengths, options, words):
    with pytest.raises(DataError, match=words):
        packing.pack(np.array(lengths), 8, **options)


SIZES = np.random.default_rng(7).integers(4, 70, 500)


def of_size(positions: np.ndarray) -> np.ndarray:
    """Lengths of an endless plan over 500 examples."""
    epochs, places = np.divmod(positions, 500)
    out = np.zeros_like(places)
    for epoch in set(epochs.tolist()):
        out[epochs == epoch] = SIZES[plan.permute(places[epochs == epoch], 500, 0, epoch)]
    return out


def make(rows: int = 16, **options) -> windows.PackedPlan:
    return windows.PackedPlan(of_size, 128, rows, window=100, seed=5, **options)


def test_steps_cover_every_position_once():
    packed, seen = make(), []
    for step in range(40):
        rows = packed.rows(step)
        assert rows.row.min() == 0 and rows.row.max() == 15
        used = np.bincount(rows.row, rows.length)
        assert (used <= 128).all() and used.mean() > 115
        for row in range(16):
            here = rows.row == row
            assert rows.segment[here].tolist() == list(range(1, here.sum() + 1))
            assert (rows.start[here] == np.cumsum(rows.length[here]) - rows.length[here]).all()
        np.testing.assert_array_equal(rows.length, of_size(rows.position))
        seen += rows.position.tolist()
    whole = packed.place(40).window * 100  # windows that are over
    assert len(seen) == len(set(seen)) and set(range(whole)) <= set(seen) and whole > 1000


@pytest.mark.parametrize("hosts", [1, 2, 4, 16])
def test_hosts_supply_consecutive_rows(hosts):
    whole = make()
    for step in (0, 7, 23):
        wanted = whole.rows(step)
        own = 16 // hosts
        parts = [make().rows(step, range(h * own, (h + 1) * own)) for h in range(hosts)]
        for name in ("position", "start", "length", "segment"):
            np.testing.assert_array_equal(
                np.concatenate([getattr(part, name) for part in parts]), getattr(wanted, name)
            )
        rows = np.concatenate([part.row + h * own for h, part in enumerate(parts)])
        np.testing.assert_array_equal(rows, wanted.row)


def test_going_on_from_a_saved_place_needs_no_past():
    whole = make()
    for step in (1, 5, 17, 31):
        place = windows.Place(*json.loads(json.dumps(whole.place(step))))
        asked = []

        def lengths(positions, asked=asked):
            asked.append(int(positions[0]) // 100)
            return of_size(positions)

        again = windows.PackedPlan(lengths, 128, 16, window=100, seed=5, start=place)
        for later in (step, step + 3, step):
            for one, other in zip(again.rows(later), whole.rows(later), strict=True):
                np.testing.assert_array_equal(one, other)
        assert min(asked) == place.window and again.place(step + 3) == whole.place(step + 3)
        for one, other in zip(again.rows(0), whole.rows(0), strict=True):  # an earlier step, if one wants it
            np.testing.assert_array_equal(one, other)


def test_other_batch_size_goes_on_at_the_same_row():
    """A place is a row of a window, so a run may go on with other batches; it names the step it goes on at."""
    whole = make()
    place = whole.place(10)
    half = make(8, start=place._replace(step=20))
    first = whole.rows(10).position.tolist()
    assert half.rows(20).position.tolist() + half.rows(21).position.tolist() == first


def test_steps_longer_than_windows_and_windows_without_rows():
    def lengths(positions):
        return np.where((positions // 10) % 3 == 1, 0, 60)  # every third window holds nothing usable

    packed = windows.PackedPlan(lengths, 128, 16, window=10)
    seen = np.concatenate([packed.rows(step).position for step in range(5)])
    assert all(end > first for step in range(5) for _, first, end in packed.windows.spans(step))
    wanted = [p for p in range(1000) if (p // 10) % 3 != 1][: len(seen)]
    assert len(seen) == 160 and sorted(seen.tolist()) == wanted
    nothing = windows.PackedPlan(lambda positions: positions * 0, 128, 4, window=10)
    with pytest.raises(DataError, match="nothing in 8 windows on end"):
        nothing.rows(0)


def test_laying_out_a_row():
    out = packing.empty_rows(2, 8, 99)
    assert packing.lay(out, 1, 0, 3, 1, [5, 6, 7]) == 0
    assert packing.lay(out, 1, 3, 2, 2, np.array([8, 9, 10]), [1.0, 0.5, 1.0]) == 1
    assert packing.lay(out, 1, 6, 2, 4, [4]) == 0
    assert out["input_ids"].tolist() == [[99] * 8, [5, 6, 7, 8, 9, 99, 4, 99]]
    assert out["segment_ids"].tolist() == [[0] * 8, [1, 1, 1, 2, 2, 0, 4, 0]]
    assert out["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert out["loss_weights"][1].tolist() == [0, 1, 1, 0, 0.5, 0, 0, 0]
    assert {name: value.dtype.name for name, value in out.items()} == {
        "input_ids": "int32",
        "segment_ids": "int32",
        "position_ids": "int32",
        "loss_weights": "float32",
    }
