"""Activations stay with their examples: constraints are heard where there is a mesh, and hold what they promise."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sharding.small_step import dual_encoder, lowered_step

from tests.models import tiny_models
from vlmjax.data.images import EvalTransform
from vlmjax.evals.embed import Embedder
from vlmjax.models.bert import Bert
from vlmjax.models.text import Text
from vlmjax.models.vit import Vit
from vlmjax.sharding.activations import constrain, on_mesh
from vlmjax.sharding.mesh import make_mesh
from vlmjax.training.start import init_params

EXAMPLES, HEADS, MLP = (
    '[{"data", "fsdp"}, {}, {}]',
    '[{"data", "fsdp"}, {}, {"tensor"}, {}]',
    '[{"data", "fsdp"}, {}, {"tensor"}]',
)
POOLED = '[{"data", "fsdp"}, {}]'
FOUR = np.concatenate([tiny_models.IDS, tiny_models.IDS[:1]])
TOWERS = {
    "vit": (Vit, tiny_models.change(tiny_models.VIT, width=48, heads=4), tiny_models.images(4)),
    "text": (Text, tiny_models.change(tiny_models.TEXT, heads=4), FOUR),
    "bert": (Bert, tiny_models.change(tiny_models.BERT, heads=4, dropout=0.0), FOUR),
}


def constraints(text):
    """How often each placement of an activation is asked for, in each function of a lowered program."""
    return {
        function.split("(")[0].split()[-1]: Counter(
            re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, (\[.*?\])> ", function)
        )
        for function in text.split("func.func ")[1:]
        if "sdy.sharding_constraint" in function
    }


def placed(shape, *names, sizes=(2, 2, 2), function=constrain):
    """The spec that `constrain` puts on an array of this shape; None where it puts none."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    jaxpr = jax.make_jaxpr(on_mesh(mesh)(lambda x: function(x, *names)))(np.zeros(shape, np.float32))
    found = [e.params["sharding"].spec for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    return found[0] if found else None


def test_names_become_axes():
    both = ("data", "fsdp")
    assert placed((4, 3, 6, 5), "batch", None, "heads", None) == PartitionSpec(both, None, "tensor", None)
    assert placed((8, 3, 6), "batch", None, "mlp", sizes=(8, 1, 1)) == PartitionSpec(both, None, "tensor")
    with pytest.raises(KeyError, match="colour"):
        placed((4,), "colour")
    with pytest.raises(ValueError):
        placed((4, 4), "batch")


def test_what_cannot_be_cut_stays_whole():
    assert placed((1, 3, 6), "batch", None, "mlp") == PartitionSpec(None, None, "tensor")
    assert placed((4, 3), "batch", "heads") == PartitionSpec(("data", "fsdp"), None)


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", "mlp") is x
    assert placed((4, 2), "batch", "mlp", sizes=(1, 1, 1)) is None
    assert on_mesh(make_mesh(devices=jax.devices()[:1]))(len) is len
    mesh = make_mesh()
    inside = jax.shard_map(
        lambda part: constrain(part, "batch", None),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )
    np.testing.assert_array_equal(jax.jit(inside)(jnp.ones((8, 2))), np.ones((8, 2)))


def test_a_users_own_mesh_may_have_other_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        made = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.ones((8, 2)))
    assert made.sharding.spec == PartitionSpec("data")


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_asks_for_what_it_should(name, remat):
    kind, config, inputs = TOWERS[name]
    model = kind(tiny_models.change(config, remat=remat))
    params = tiny_models.make_params(model, inputs)

    def pooled(params, inputs):
        return model.apply({"params": params}, inputs).pooler_output.sum()

    assert constraints(jax.jit(jax.grad(pooled)).lower(params, inputs).as_text()) == {}
    forward = on_mesh(make_mesh(2, 2, 2))(pooled)
    main, body = constraints(jax.jit(forward).lower(params, inputs).as_text()).values()
    assert main == {EXAMPLES: 1, POOLED: 2 if name == "bert" else 1} | (
        {"[{}, {}]": 1} if name != "vit" else {}
    )
    # One layer: the stream after attention and after the MLP; queries, keys and values; the MLP's inside.
    assert body == {EXAMPLES: 2, HEADS: 3, MLP: 1}
    on_the_way_back = jax.jit(on_mesh(make_mesh(2, 2, 2))(jax.grad(pooled))).lower(params, inputs)
    *_, body = [found for found in constraints(on_the_way_back.as_text()).values() if HEADS in found]
    # The cotangent of each; recomputed is all but the last stream, which nobody reads.
    again = {EXAMPLES: 1, HEADS: 3, MLP: 1} if remat == "full" else {}
    assert body == Counter({EXAMPLES: 2, HEADS: 3, MLP: 1}) + Counter(again)


def test_the_train_step_hears_them_unless_one_device_has_all():
    model = dual_encoder(depth=2)
    assert (
        sum(map(Counter.total, constraints(lowered_step(model, make_mesh(fsdp=8), 64).as_text()).values()))
        > 24
    )
    alone = make_mesh(devices=jax.devices()[:1])
    assert constraints(lowered_step(model, alone, 64).as_text()) == {}


def test_evaluations_hear_them():
    model, mesh = dual_encoder(depth=2), make_mesh(fsdp=8)
    embedder = Embedder(model, None, EvalTransform(16, (16, 16)), mesh)
    params = jax.eval_shape(lambda: init_params(model, 0))
    pixels, ids = (
        jax.ShapeDtypeStruct((8, *shape), kind) for shape, kind in (((16, 16, 3), "uint8"), ((12,), "int32"))
    )
    for lowered in (embedder._images.lower(params, pixels), embedder._texts.lower(params, ids, ids)):
        assert {EXAMPLES: 2, HEADS: 3, MLP: 1} in constraints(lowered.as_text()).values()


def test_parameters_travel_and_activations_do_not():
    """Cut parameters over the axis of the batch: nothing of all examples but features meets on a device.

    Without constraints every layer's activations would be gathered or summed whole, and the step would take 7.7 MB.
    """
    batch = 64
    compiled = lowered_step(dual_encoder(remat="full"), make_mesh(fsdp=8), batch).compile()
    moved = re.findall(
        r"= (.*) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", compiled.as_text()
    )
    shapes = [tuple(map(int, s.split(","))) for text in moved for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert (64, 256) in shapes  # a kernel: the expression above does find them
    assert not [shape for shape in shapes if len(shape) > 2 and batch in shape[:2]]
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5e6
    kernels = 2 * 3 * (4 * 64 * 64 + 2 * 64 * 256)
    assert compiled.memory_analysis().argument_size_in_bytes < 3 * 4 * kernels / 8 + 150e3
