"""Reading programs: shapes, operands, and how often loops run."""

import jax
import jax.numpy as jnp
import pytest

from vlmjax.planning import hlo

LOOP = """HloModule loop, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %y = f32[8]{0:T(8,128)(2,1)S(1)} fusion(%x, /*index=1*/%x), kind=kLoop, calls=%twice, metadata={op_name="f(a)"}
  ROOT %next = (s32[], f32[8]) tuple(%i, %y)
}

%until (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(24)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %first = s32[] constant(4)
  %start = s32[] copy(%first)
  %begin = (s32[], f32[8]) tuple(%start, %x.1)
  %loop = (s32[], f32[8]{0:T(8)}) while(%begin), condition=%until, body=%body, metadata={op_name="x(y"}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_instructions():
    module = hlo.parse(LOOP)
    assert module.entry == "main" and set(module.computations) == {"body", "until", "main"}
    fusion = module.named("body")["y"]
    assert (fusion.opcode, fusion.operands, fusion.called()) == ("fusion", ("x", "x"), "twice")
    assert fusion.shape == "f32[8]{0:T(8,128)(2,1)S(1)}"
    loop = module.named("main")["loop"]
    assert (loop.opcode, loop.operands, loop.called("body"), loop.called("condition")) == (
        "while", ("begin",), "body", "until",
    )  # fmt: skip
    assert module.named("until")["limit"].argument == "24"
    assert [i.name for i in module.computations["main"] if i.is_root] == ["out"]
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[8]{0:T(256)S(1)}", 32),
        ("bf16[2,3,4]{2,1,0:T(8,128)(2,1)}", 48),
        ("pred[]", 1),
        ("(s32[]{:T(128)}, /*index=1*/(u8[5], f8e4m3fn[3]), s4[3])", 4 + 5 + 3 + 2),
        ("token[]", 0),
    ],
)
def test_sizes(shape, size):
    assert hlo.size_of(shape) == size


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("", ""), 20),  # from 4, below 24
        (("direction=LT", "direction=LE"), 21),
        (("tuple(%start,", "tuple(%x.1,"), 24),  # no constant to begin with: 0
        (('metadata={op_name="x(y"}', 'backend_config={"known_trip_count":{"n":"7"}}'), 7),
        (("direction=LT", "direction=NE"), None),
        (("compare(%i.1, %limit)", "compare(%i.1, %i.1)"), None),
    ],
)
def test_how_often_a_loop_runs(change, count):
    module = hlo.parse(LOOP.replace(*change))
    assert hlo.trip_count(module, module.named("main")["loop"], "main") == count


def test_a_real_loop():
    """XLA's own text, today's: a scan of seven steps inside one of five."""

    def five(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y @ y), x)

    text = jax.jit(lambda x: jax.lax.fori_loop(3, 10, lambda _, y: five(y), x)).lower(jnp.ones((64, 64)))
    module = hlo.parse(text.compile().as_text())
    counts = {
        hlo.trip_count(module, instruction, name)
        for name, body in module.computations.items()
        for instruction in body
        if instruction.opcode == "while"
    }
    assert counts == {5, 7}


def test_a_kernel_whose_metadata_has_line_breaks_ends_nothing():
    """Splash attention's does; all instructions after it were lost."""
    text = """HloModule m

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={a={
 "note": "{\\"block\\": 512}"
}}, metadata={op_name="x"}
  ROOT %after = f32[4]{0} add(%kernel, %p)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %call = f32[4]{0} call(%x), to_apply=%body
}
"""
    module = hlo.parse(text)
    assert [i.opcode for i in module.computations["body"]] == ["parameter", "custom-call", "add"]
    assert module.named("body")["kernel"].operands == ("p",)
    assert 'op_name="x"' in module.named("body")["kernel"].attributes
    assert module.entry == "main"
