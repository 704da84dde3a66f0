"""Time and traffic of small programs, counted by hand."""

import pytest

from vlmjax.planning import hlo
from vlmjax.planning.chips import Chip
from vlmjax.planning.fabric import Fabric
from vlmjax.planning.timing import cycles_timing
from vlmjax.planning.walk import Walker

CHIP = Chip(
    "TPU v5 lite", 16 << 30, 8e11, 1000.0, ports=4, link=10.0, network=1.0
)  # 1000 cycles are a second


class Device:
    platform, slice_index = "tpu", 0

    def __init__(self, number):
        self.coords = (number, 0, 0)


def cycles(count):
    return f'backend_config={{"estimated_cycles":"{count}"}}'


def walk(body, computations="", devices=4, utilisation=0.92):
    text = f"HloModule m\n{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    fabric = Fabric([Device(i) for i in range(devices)], CHIP)
    return Walker(hlo.parse(text), cycles_timing(CHIP, utilisation), fabric).run()


PERMUTE = """
  %x = f32[8] parameter(0)
  %start = (f32[250], f32[250], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %work = f32[8] fusion(%x), kind=kLoop, calls=%c, BACKEND
  ROOT %end = f32[250] collective-permute-done(%start)
"""


@pytest.mark.parametrize(("work", "exposed"), [(0, 100), (40_000, 60), (100_000, 0), (200_000, 0)])
def test_a_transfer_is_exposed_where_no_work_hides_it(work, exposed):
    """1000 bytes at 10 bytes a second."""
    found = walk(PERMUTE.replace("BACKEND", cycles(work)))
    assert found.compute_seconds == work / 1000 and found.exposed_seconds == pytest.approx(exposed)
    assert found.collectives() == {"collective-permute": {"sync": 0, "async": 1, "bytes": 1000}}


def test_collectives_at_once_are_exposed():
    found = walk(
        f"""
  %x = f32[8] parameter(0)
  %a = f32[100] all-reduce(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add, {cycles(7)}
  %b = f32[100] all-gather(%x), replica_groups=[2,2]<=[4], dimensions={{0}}
  %c = f32[100] reduce-scatter(%x), replica_groups=[2,2]<=[4], to_apply=%add
  %d = f32[100] collective-permute(%x), source_target_pairs={{{{0,1}}}}
  ROOT %e = f32[8] fusion(%x), calls=%nothing, {cycles(5000)}"""
    )
    assert found.compute_seconds == 5
    expected = 2 * 400 * 3 / 4 / 20 + 400 / 2 / 20 + 800 / 2 / 20 + 400 / 10
    assert found.exposed_seconds == pytest.approx(expected)
    assert found.collectives() == {
        "all-gather": {"sync": 1, "async": 0, "bytes": 400},
        "all-reduce": {"sync": 1, "async": 0, "bytes": 400},
        "collective-permute": {"sync": 1, "async": 0, "bytes": 400},
        "reduce-scatter": {"sync": 1, "async": 0, "bytes": 800},
    }


LOOPS = """
%inner (a: (s32[])) -> (s32[]) {
  %a = (s32[]) parameter(0)
  %w = f32[8] fusion(%a), calls=%n, backend_config={"estimated_cycles":"10"}
  %p = f32[100] collective-permute(%w), source_target_pairs={{0,1}}
  ROOT %t = (s32[]) tuple(%a)
}
%outer (b: (s32[])) -> (s32[]) {
  %b = (s32[]) parameter(0)
  %v = f32[8] copy(%b), backend_config={"estimated_cycles":"1000"}
  ROOT %w = (s32[]) while(%b), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}
%slow (d: f32[8]) -> f32[8] {
  ROOT %v = f32[8] copy(%d), backend_config={"estimated_cycles":"3000"}
}
%quick (d: f32[8]) -> f32[8] {
  ROOT %v = f32[8] copy(%d), backend_config={"estimated_cycles":"2000"}
}
%until (b: (s32[])) -> pred[] {
  ROOT %x = pred[] parameter(0)
}
"""


def test_loops_in_loops_and_branches():
    loops = """
  %x = f32[8] parameter(0)
  %o = (s32[]) while(%x), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[8] conditional(%x, %x, %x), branch_computations={%quick, %slow}
"""
    found = walk(loops, LOOPS)
    assert found.compute_seconds == pytest.approx(3 * (1 + 5 * 0.01) + 3)
    assert found.exposed_seconds == pytest.approx(15 * 400 / 10)
    assert found.collectives()["collective-permute"] == {"sync": 15, "async": 0, "bytes": 15 * 400}
    assert found.unknown_loops == 0
    called = walk("  ROOT %r = f32[8] call(%x), to_apply=%slow", LOOPS)
    assert called.compute_seconds == 3
    either = walk(
        "  ROOT %r = f32[8] conditional(%p, %x, %x), true_computation=%slow, false_computation=%quick", LOOPS
    )
    assert either.compute_seconds == 3
    endless = walk("  ROOT %o = (s32[]) while(%x), condition=%until, body=%outer", LOOPS)
    assert endless.unknown_loops == 1 and endless.compute_seconds == pytest.approx(1 + 0.05)


FUSED = """
%begin (x: f32[25]) -> (f32[100], s32[2]) {
  %x = f32[25] parameter(0)
  %g = f32[100] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="3"}
  ROOT %s = (f32[100], s32[2]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%part (x: f32[25]) -> f32[8] {
  %x = f32[25] parameter(0)
  %g = f32[100] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="3"}
  ROOT %w = f32[8] convert(%x)
}
%finish (x: f32[25]) -> f32[100] {
  %x = f32[25] parameter(0)
  %g = f32[100] all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="3"}
  ROOT %d = f32[100] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
%scatter (x: f32[100]) -> f32[25] {
  %x = f32[100] parameter(0)
  %r = f32[100] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[25] dynamic-slice(%r, %i), dynamic_slice_sizes={25}
}
"""


def test_a_tpu_hides_collectives_inside_fusions():
    """Start, part and end are one gathering of 400 bytes, 15 s; 6 s of work run in its parts and beside them."""
    found = walk(
        f"""
  %x = f32[25] parameter(0)
  %a = (f32[100], s32[2]) fusion(%x), kind=kCustom, calls=%begin
  %b = f32[8] fusion(%x), kind=kOutput, calls=%part, {cycles(4000)}
  %c = f32[8] copy(%x), {cycles(2000)}
  ROOT %d = f32[100] fusion(%x), kind=kCustom, calls=%finish""",
        FUSED,
    )
    assert found.collectives() == {"all-gather": {"sync": 0, "async": 1, "bytes": 400}}
    assert found.compute_seconds == 6 and found.exposed_seconds == pytest.approx(400 * 3 / 4 / 20 - 6)


def test_a_sum_and_a_slice_are_a_reduce_scatter():
    found = walk(f"  ROOT %a = f32[25] fusion(%x), kind=kCustom, calls=%scatter, {cycles(7)}", FUSED)
    assert found.compute_seconds == 0  # what it takes is the transfer
    assert found.collectives() == {"reduce-scatter": {"sync": 1, "async": 0, "bytes": 400}}
    assert found.exposed_seconds == pytest.approx(400 * 3 / 4 / 20)


def test_pairs_of_start_and_done():
    found = walk(
        f"""
  %x = f32[25] parameter(0)
  %a = (f32[25], f32[100]) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}
  %b = f32[100] all-reduce-start(%x), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %c = ((f32[100]), f32[25]) reduce-scatter-start(%x), replica_groups={{{{0,1,2,3}}}}
  %w = f32[8] copy(%x), {cycles(20_000)}
  %d = f32[100] all-gather-done(%a)
  %e = f32[100] all-reduce-done(%b)
  ROOT %f = f32[25] reduce-scatter-done(%c)"""
    )
    assert {kind: row["bytes"] for kind, row in found.collectives().items()} == {
        "all-gather": 400, "all-reduce": 400, "reduce-scatter": 400,
    }  # fmt: skip
    assert all(row["async"] == 1 and row["sync"] == 0 for row in found.collectives().values())
    assert found.exposed_seconds == pytest.approx(10)  # of the sum's 30 s; the others end within 20 s


def test_an_async_computation_with_a_collective_inside():
    inside = """
%wrapped (x: f32[100]) -> f32[25] {
  %x = f32[100] parameter(0)
  ROOT %r = f32[25] reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    found = walk(
        f"""
  %x = f32[100] parameter(0)
  %a = ((f32[100]), f32[25], s32[]) async-start(%x), calls=%wrapped
  %b = ((f32[100]), f32[25], s32[]) async-update(%a)
  %w = f32[8] copy(%x), {cycles(5_000)}
  ROOT %c = f32[25] async-done(%b)""",
        inside,
    )
    assert found.collectives() == {"reduce-scatter": {"sync": 0, "async": 1, "bytes": 400}}
    assert found.exposed_seconds == pytest.approx(15 - 5)


def test_kernels_by_the_flops_they_state():
    kernel = (
        '  ROOT %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"QQ==","cost_estimate":{"flops":"FLOPS"}}}'
    )
    flops = int(197e12)
    found = walk(kernel.replace("FLOPS", str(flops)), utilisation=0.5)
    assert found.compute_seconds == pytest.approx(2.0) and found.unknown_kernels == 0
    silent = walk(kernel.replace('"flops":"FLOPS"', ""))
    assert silent.compute_seconds == 0 and silent.unknown_kernels == 1


def test_transfers_between_slices():
    """Sent to the host and received from it; between two slices a sum moves the buffer twice by half."""
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="sum_0",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""HloModule m
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[100] parameter(0)
  %t = token[] after-all()
  %s = (f32[100], u32[], token[]) send(%x, %t), channel_id=7, {attributes}
  %r = (f32[100], u32[], token[]) recv(%t), channel_id=8, {attributes}
  %w = f32[8] copy(%x), {cycles(100_000)}
  %d = token[] send-done(%s), channel_id=7
  ROOT %e = (f32[100], token[]) recv-done(%r), channel_id=8
}}
"""
    devices = [Device(0), Device(1)]
    devices[1].slice_index = 1
    found = Walker(hlo.parse(text), cycles_timing(CHIP), Fabric(devices, CHIP)).run()
    assert found.collectives() == {"all-reduce between slices": {"sync": 0, "async": 1, "bytes": 400}}
    assert found.exposed_seconds == pytest.approx(400 - 100)
    gathered = text.replace("ALL_REDUCE", "ALL_GATHER")
    found = Walker(hlo.parse(gathered), cycles_timing(CHIP), Fabric([*devices, *devices], CHIP)).run()
    assert found.exposed_seconds == pytest.approx(400 - 100)
