"""Mixture, packing, several captions and damaged records together: global batches, epochs, going on."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers import encoded, memory, picture, tokenizer

from vlmjax.data import images, mixture, packing, plan
from vlmjax.data.captions import CaptionRule
from vlmjax.data.mixture import Mixture
from vlmjax.data.record import Record
from vlmjax.data.sources import Concat
from vlmjax.data.windows import BEGINNING, PackedPlan, Place
from vlmjax.errors import BadRecord

ROWS, CAPACITY, WINDOW, SEED = 16, 48, 96, 5
RULE = CaptionRule("random", ("{caption}", "a {caption} again and again"))


@pytest.fixture(name="words", scope="module")
def _words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), 32)


def _sources() -> list:
    out = []
    for number, count in enumerate((90, 40)):
        source = memory(count, captions=3)
        source.name, source.fingerprint = f"source{number}", f"print{number}"
        jpeg = encoded(picture(0, 60, 60), "JPEG")
        for i in range(number, count, 33):  # 3 %
            source.entries[i] = Record(f"k{i}", jpeg[: len(jpeg) // 2], source.entries[i].captions)
        out.append(source)
    return out


class Packed:
    """Packed batches of one host, from the pieces that stages with long sequences use."""

    def __init__(self, words, host: int = 0, hosts: int = 1, start: Place = BEGINNING):
        """A host of several, going on from a saved place."""
        sources = _sources()
        share = mixture.shares([len(source) for source in sources], "equal", (0.4, 0.6))
        self.source, self.words = Concat(sources), words
        self.order = Mixture(mixture.parts_of(sources, share), SEED)
        self.own = range(host * ROWS // hosts, (host + 1) * ROWS // hosts)
        self.asked: list[int] = []
        self.plan = PackedPlan(self._lengths, CAPACITY, ROWS, window=WINDOW, seed=SEED, start=start)

    def _text(self, position: int, index: int) -> str:
        return RULE(self.source[index].captions, plan.example_rng(SEED, position)).text

    def _lengths(self, positions: np.ndarray) -> np.ndarray:
        self.asked += positions.tolist()
        indices = self.order(positions)
        return self.words.lengths(
            [self._text(*one) for one in zip(positions.tolist(), indices.tolist(), strict=True)]
        )

    def batch(self, step: int) -> tuple[dict[str, np.ndarray], Counter, list[int]]:
        """The rows of this host with the sums of their pixels, failures by reason, and positions."""
        rows = self.plan.rows(step, self.own)
        out = packing.empty_rows(len(self.own), CAPACITY, self.words.pad_token_id)
        out["pixels"] = np.zeros((len(self.own), CAPACITY), np.int64)
        bad = Counter()
        for position, row, start, length, segment in zip(*(column.tolist() for column in rows), strict=True):
            index = int(self.order(np.array([position]))[0])
            try:
                pixels = images.decode(self.source[index].image)
            except BadRecord as error:
                bad[error.reason] += 1
                continue
            ids = self.words.encode(self._text(position, index))
            packing.lay(out, row, start, length, segment, ids)
            out["pixels"][row, start] = pixels.astype(np.int64).sum()
        return out, bad, rows.position.tolist()


@pytest.mark.parametrize("hosts", [1, 2, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_the_global_batch_is_the_same_for_any_number_of_hosts(words, hosts):
    one, several = Packed(words), [Packed(words, host, hosts) for host in range(hosts)]
    for step in (0, 9):
        whole, bad, _ = one.batch(step)
        parts = [each.batch(step) for each in several]
        for name, value in whole.items():
            np.testing.assert_array_equal(
                np.concatenate([part[0][name] for part in parts]), value, err_msg=name
            )
        assert sum((part[1] for part in parts), Counter()) == bad
        assert (whole["segment_ids"] > 0).mean() > 0.8


def test_every_epoch_of_every_source_is_whole(words):
    one = Packed(words)
    positions, bad = [], Counter()
    for step in range(16):
        _, failed, there = one.batch(step)
        positions, bad = positions + there, bad + failed
    done = max(p for p in range(0, len(positions), WINDOW) if set(range(p)) <= set(positions))
    assert done >= 5 * WINDOW and len(set(positions)) == len(positions)
    taken = one.order(np.arange(done))
    for first, size in ((0, 90), (90, 40)):
        mine = taken[(taken >= first) & (taken < first + size)] - first
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert set(bad) == {"truncated"} and 0.01 < bad["truncated"] / len(positions) < 0.06


def test_going_on_on_another_number_of_hosts_looks_at_nothing_of_the_past(words):
    before = Packed(words)
    before.batch(12)
    state = json.loads(json.dumps({"place": before.plan.place(12), **before.order.state()}))
    assert len(json.dumps(state)) < 1000
    parts = [Packed(words, host, 2, Place(*state["place"])) for host in range(2)]
    for step in (12, 15):
        whole = before.batch(step)[0]
        halves = [part.batch(step)[0] for part in parts]
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), value)
    assert min(min(part.asked) for part in parts) >= state["place"][1] * WINDOW > 0
