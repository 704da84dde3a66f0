"""Rooflines of single instructions, by hand, and against what XLA counts itself."""

import jax
import jax.numpy as jnp
import pytest

from vlmjax.planning import hlo
from vlmjax.planning.chips import Chip
from vlmjax.planning.timing import cycles_timing, flops, roofline_timing, traffic

GPU = Chip("NVIDIA H100", 80 << 30, 1e12, None, 1, 1.0, 1.0)

TEXT = """HloModule m
%product (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8] parameter(0)
  %b = f32[8,16] parameter(1)
  ROOT %d = f32[4,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%take (s: f32[24,8,16], i: s32[]) -> f32[1,8,16] {
  %s = f32[24,8,16] parameter(0)
  %i = s32[] parameter(1)
  ROOT %t = f32[1,8,16] dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,16}
}
%put (s: f32[24,8,16], u: f32[1,8,16], i: s32[]) -> f32[24,8,16] {
  %s = f32[24,8,16] parameter(0)
  %u = f32[1,8,16] parameter(1)
  %i = s32[] parameter(2)
  ROOT %t = f32[24,8,16] dynamic-update-slice(%s, %u, %i, %i, %i)
}
ENTRY %main (x: f32[4,8], y: f32[8,16], s: f32[24,8,16], i: s32[], u: f32[1,8,16]) -> f32[4,16] {
  %x = f32[4,8] parameter(0)
  %y = f32[8,16] parameter(1)
  %s = f32[24,8,16] parameter(2)
  %i = s32[] parameter(3)
  %u = f32[1,8,16] parameter(4)
  %fused = f32[4,16] fusion(%x, %y), kind=kCustom, calls=%product
  %taken = f32[1,8,16] fusion(%s, %i), kind=kLoop, calls=%take
  %put_in = f32[24,8,16] fusion(%s, %u, %i), kind=kLoop, calls=%put
  %bare = f32[1,8,16] dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,16}
  %blas = (f32[4,16], s8[64]) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %conv = f32[2,7,7,32] convolution(%p, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
  ROOT %dot = f32[4,16] dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501
MODULE = hlo.parse(TEXT)
MAIN = MODULE.named("main")


@pytest.mark.parametrize(
    ("name", "operations", "moved"),
    [
        ("dot", 2 * 4 * 8 * 16, 4 * (32 + 128 + 64)),
        ("fused", 2 * 4 * 8 * 16, 4 * (32 + 128 + 64)),
        ("blas", 2 * 4 * 8 * 16, 4 * (32 + 128 + 64) + 64),
        ("taken", 0, 2 * 512 + 4),  # of the stack of 24 only the layer that is taken
        ("put_in", 0, 3 * 512 + 4),
        ("bare", 0, 2 * 512),
    ],
)
def test_operations_and_bytes(name, operations, moved):
    instruction = MAIN[name]
    assert flops(MODULE, "main", instruction) == operations
    assert traffic(MODULE, "main", instruction) == moved
    expected = max(operations / 989e12, moved / 1e12)
    assert roofline_timing(GPU)(MODULE, "main", instruction) == pytest.approx(expected)


def test_a_convolution():
    text = TEXT.replace(
        "%u = f32[1,8,16] parameter(4)", "%p = f32[2,9,9,3] parameter(4)\n  %k = f32[3,3,3,32] parameter(5)"
    )
    module = hlo.parse(text)
    found = flops(module, "main", module.named("main")["conv"])
    assert found == 2 * (2 * 7 * 7 * 32) * (3 * 3 * 3)


def test_what_takes_no_time():
    timing = roofline_timing(GPU)
    assert timing(MODULE, "main", MAIN["x"]) is None
    assert (
        cycles_timing(GPU._replace(clock=1e9))(MODULE, "main", MAIN["dot"]) is None
    )  # no cycles in the text


def test_products_as_xla_counts_them():
    """The oracle is XLA's own count of a program without loops, its elementwise work left out by its size."""

    def f(x, y):
        return (x @ y).sum() + jnp.einsum("bij,bkj->bik", x.reshape(4, 64, 256), y.reshape(4, 64, 256)).sum()

    compiled = jax.jit(f).lower(jnp.ones((256, 256)), jnp.ones((256, 256))).compile()
    module = hlo.parse(compiled.as_text())
    ours = sum(
        flops(module, name, instruction)
        for name, body in module.computations.items()
        for instruction in body
        if instruction.opcode == "dot"
    )
    assert ours == 2 * 256**3 + 2 * 4 * 64 * 64 * 256
    assert ours == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
