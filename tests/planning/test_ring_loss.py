"""The streaming loss compiled for a v5e that is not here: what its ring waits for, its kernels, its memory and time."""

import pytest
from planning.tpu import devices, needs_libtpu

from vlmjax.losses import travel
from vlmjax.planning.plan import make_plan
from vlmjax.planning.subject import loss_subject

pytestmark = needs_libtpu


def planned(batch, width, text):
    name, found = devices(text)
    return make_plan(name, loss_subject(batch, width, found, "ring"))


@pytest.mark.slow
def test_the_ring_never_waits_and_runs_in_our_kernels():
    """64 chips are more than a v5e can route between rows and columns at once."""
    made = planned(64 * 512, 128, "v5e:8x8")
    permutes = made.walk.collectives()["collective-permute"]
    assert permutes["sync"] == 0 and permutes["async"] > 64 and made.warnings() == []
    assert "info_nce_forward" in made.compiled.text and "info_nce_backward" in made.compiled.text


@pytest.mark.slow
def test_in_the_order_of_device_numbers_it_would_wait(monkeypatch):
    """Why the ring has an order of its own; and the warning that says so."""
    monkeypatch.setattr(travel, "ring_cycle", lambda mesh, axes: tuple(range(mesh.size)))
    made = planned(64 * 128, 128, "v5e:8x8")
    assert made.walk.collectives()["collective-permute"]["sync"] > 0
    assert "collective-permute(s) are synchronous" in made.warnings()[0]


@pytest.mark.slow
def test_a_million_pairs_take_a_tenth_of_a_gib():
    made = planned(1 << 20, 1024, "v5e:16x16")
    assert made.compiled.peak_bytes <= 0.1 * 2**30
    assert made.seconds <= 1.3 * made.ideal_seconds
    assert made.warnings() == []
