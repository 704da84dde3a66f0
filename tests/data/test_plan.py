"""The order of the data: bijections, independence of hosts, randomness by position."""

import pickle
import threading

import numpy as np
import pytest

from vlmjax.data import blocks, plan


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097])
def test_every_epoch_is_a_permutation(n):
    orders = [plan.permutation(7, epoch, n) for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    if n > 15:
        assert not (orders[0] == orders[1]).all()
        assert not (orders[0] == plan.permutation(8, 0, n)).all()


def test_the_order_is_fixed_for_good():
    """A change of these numbers changes the data order of every run that is resumed."""
    assert plan.permutation(0, 0, 10).tolist() == [7, 2, 9, 8, 1, 4, 5, 6, 3, 0]
    assert plan.permutation(5, 3, 10**4)[:4].tolist() == plan.permute(np.arange(4), 10**4, 5, 3).tolist()


def test_huge_sets_need_no_table():
    n = 10**12 + 39
    out = plan.permute(np.arange(1000), n, 1, 2)
    assert len(set(out.tolist())) == 1000 and 0 <= out.min() and out.max() < n
    assert abs(out.mean() / n - 0.5) < 0.05


def test_order_looks_random():
    order = plan.permutation(3, 0, 20_000)
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order, plan.permutation(3, 1, 20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    # Steps between neighbours of a shuffled list are rarely 1.
    assert (np.diff(order) == 1).sum() < 10


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_global_batches_do_not_depend_on_hosts_or_chunks(hosts):
    n, batch = 37, 12
    for step in (0, 3, 7):
        rows = []
        for host in range(hosts):
            own = range(host * batch // hosts, (host + 1) * batch // hosts)
            one = plan.Plan(blocks.Order(n, 2), batch, own, start_step=step, chunk=5)
            chunks = [one[c] for c in range(one.chunks_per_batch)]
            assert [c.start for c in chunks] == list(range(0, len(own), 5))
            assert all(c.step == step for c in chunks)
            rows += [i for c in chunks for i in c.indices.tolist()]
        positions = range(step * batch, (step + 1) * batch)
        assert rows == [int(plan.permutation(2, g // n, n)[g % n]) for g in positions]


def test_generators_depend_on_seed_position_and_stream():
    draws = {
        args: plan.example_rng(*args).random(4).tobytes()
        for args in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 2**40, 0), (-1, 0, 0)]
    }
    assert len(set(draws.values())) == len(draws)
    assert plan.example_rng(0, 5).random() == plan.example_rng(0, 5).random()


def test_reset_generators_give_the_same_numbers():
    """Whatever was drawn before: halves of words and normal pairs must not be left over."""
    one = pickle.loads(pickle.dumps(plan.Generators(-3, 2)))
    for position in (5, 0, 2**40, 5):
        fresh, reset = plan.example_rng(-3, position, 2), one.at(position)
        assert reset.integers(0, 100, 3, np.uint32).tolist() == fresh.integers(0, 100, 3, np.uint32).tolist()
        assert reset.random() == fresh.random() and reset.standard_normal() == fresh.standard_normal()
    firsts = {}

    def draw(position):
        firsts[position] = [one.at(position).random() for _ in range(200)]

    threads = [threading.Thread(target=draw, args=(position,)) for position in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(set(got) == {plan.example_rng(-3, p, 2).random()} for p, got in firsts.items())
