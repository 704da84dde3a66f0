"""Groups in all of XLA's notations, and seconds by hand for small groups."""

import pytest

from vlmjax.planning.chips import Chip
from vlmjax.planning.fabric import Fabric, first_group, pairs

TORUS = Chip("TPU v5 lite", 16 << 30, 8e11, 1.5e9, ports=4, link=10.0, network=1.0)
NODE = Chip("NVIDIA H100", 80 << 30, 3e12, None, ports=1, link=100.0, network=10.0)


class Device:
    def __init__(self, number, *coords, island=0, platform="tpu"):
        self.id, self.coords, self.platform = number, coords, platform
        self.slice_index = self.process_index = island


def grid(slices=1):
    return [Device(i, i // 4 % 4, i % 4, 0, island=i // 16) for i in range(16 * slices)]


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("channel_id=1, replica_groups={{0,3},{1,2}}, x", [0, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, use", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("replica_groups={}", list(range(8))),
        ("", list(range(8))),
    ],
)
def test_groups(attributes, group):
    assert first_group(attributes, 8) == group


def test_pairs():
    assert pairs("source_target_pairs={{0,1},{1,2},{2,0}}, x={{7,7}}") == [(0, 1), (1, 2), (2, 0)]


def test_one_axis_and_two():
    """A row of four has two directions, the whole grid both axes: four links."""
    fabric, row = Fabric(grid(), TORUS), "replica_groups={{0,1,2,3}}"
    assert fabric.seconds("all-gather", 400, row) == pytest.approx(400 * 3 / 4 / 20)
    assert fabric.seconds("reduce-scatter", 400, row) == pytest.approx(400 * 3 / 4 / 20)
    assert fabric.seconds("all-reduce", 400, row) == pytest.approx(2 * 400 * 3 / 4 / 20)
    assert fabric.seconds("all-gather", 400, "replica_groups={}") == pytest.approx(400 * 15 / 16 / 40)
    assert fabric.seconds("all-to-all", 100, row) == pytest.approx(0.25 * 400 * 3 / 4 / 20)
    assert fabric.seconds("collective-permute", 100, "source_target_pairs={{0,1},{1,0}}") == 10
    assert Fabric(grid(), None).seconds("all-gather", 400, row) == 0


def test_between_slices():
    """Two slices of 16: each device brings a sixteenth of the buffer over its share of the network."""
    fabric = Fabric(grid(2), TORUS)
    both = fabric.seconds("all-gather", 3200, "replica_groups={}")
    assert both == pytest.approx(3200 * 31 / 32 / 40 + 3200 / 2 / 16 / 1.0)
    across = fabric.seconds("all-reduce", 100, "replica_groups={{0,16}}")
    assert across == pytest.approx(2 * 100 / 2 / 1.0)  # no fast link takes part
    assert fabric.seconds("collective-permute", 100, "source_target_pairs={{0,1},{15,16}}") == 100


def test_hosts_of_gpus():
    devices = [Device(i, island=i // 8, platform="gpu") for i in range(16)]
    fabric = Fabric(devices, NODE)
    within = fabric.seconds("all-gather", 800, "replica_groups=[2,8]<=[16]")
    assert within == pytest.approx(800 * 7 / 8 / 100)
    all_of_them = fabric.seconds("all-gather", 1600, "replica_groups=[1,16]<=[16]")
    assert all_of_them == pytest.approx(1600 * 15 / 16 / 100 + 1600 / 2 / 8 / 10)
