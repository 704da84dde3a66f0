"""The state of a run: split by regexes, put together again, every array born in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import make_mesh
from vlmjax.training.state import count, make_state, merge, split, state_shardings

PARAMS = {
    "vision_model": {"fc1": {"kernel": np.ones((2, 8, 4)), "bias": np.ones((2, 4))}},
    "text_model": {"fc1": {"kernel": np.full((2, 8, 4), 2.0), "bias": np.full((2, 4), 2.0)}},
    "logit_scale": np.float32(3.0),
}
RULES = ((".*/kernel", (None, "fsdp", "tensor")), (".*/bias", (None, "tensor")), (".*", ()))


@pytest.mark.parametrize(
    ("frozen", "left"),
    [
        ((), {"vision_model", "text_model", "logit_scale"}),
        (("vision_model/.*",), {"text_model", "logit_scale"}),
        (("vision_model/.*", "logit_scale"), {"text_model"}),
    ],
)
def test_split_and_merge(frozen, left):
    trainable, fixed = split(PARAMS, frozen)
    assert set(trainable) == left and set(trainable) | set(fixed) == set(PARAMS)
    whole = merge(trainable, fixed)
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(PARAMS), strict=True))
    assert count(trainable) + count(fixed) == count(PARAMS) == 2 * (64 + 8) + 1


def test_a_group_can_be_split_inside():
    trainable, fixed = split(PARAMS, ("vision_model/.*/kernel",))
    assert set(trainable["vision_model"]["fc1"]) == {"bias"} and set(fixed["vision_model"]["fc1"]) == {
        "kernel"
    }
    assert jax.tree.structure(merge(trainable, fixed)) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (
            ("vision",),
            r"config.frozen: 'vision' matches no parameter \(they begin with logit_scale, text_model",
        ),
        ((".*",), "leaves no parameter to train"),
    ],
)
def test_split_refuses(frozen, said):
    with pytest.raises(RecipeError, match=said):
        split(PARAMS, frozen)


@pytest.mark.parametrize("name", ["adam", "factored"])
def test_moments_lie_where_their_parameter_lies(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    made = optax.scale_by_adam() if name == "adam" else optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)

    def make(params):
        return make_state(params, ("vision_model/.*",), made, True)

    places = state_shardings(jax.eval_shape(make, params), RULES, mesh)
    state = jax.jit(make, out_shardings=places)(params)
    spec = PartitionSpec(None, "fsdp", "tensor")
    for tree in (state.frozen["vision_model"], state.params["text_model"], state.ema["text_model"]):
        assert tree["fc1"]["kernel"].sharding.spec == spec
    assert state.step.sharding.spec == PartitionSpec()
    if name == "adam":
        assert state.opt_state.mu["text_model"]["fc1"]["kernel"].sharding.spec == spec
        assert state.opt_state.nu["text_model"]["fc1"]["bias"].sharding.spec == PartitionSpec(None, "tensor")
        assert "vision_model" not in state.opt_state.mu
    else:
        # Of [2, 8, 4] on (-, fsdp, tensor): averaged over the larger dimension, and over the other one.
        row, column = (
            getattr(state.opt_state, name)["text_model"]["fc1"]["kernel"] for name in ("v_row", "v_col")
        )
        assert row.shape == (2, 4) and row.sharding.spec == PartitionSpec(None, "tensor")
        assert column.shape == (2, 8) and column.sharding.spec == PartitionSpec(None, "fsdp")
        assert state.opt_state.v["text_model"]["fc1"]["kernel"].sharding.spec == PartitionSpec()


def test_factored_moments_of_a_square_matrix_lie_as_optax_averages_them():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    made, params = optax.scale_by_factored_rms(min_dim_size_to_factor=2), {"kernel": jnp.zeros((2, 8, 8))}
    abstract = jax.eval_shape(lambda p: make_state(p, (), made, False), params)
    places = state_shardings(abstract, (("kernel", (None, "fsdp", "tensor")),), mesh).opt_state
    assert places.v_row["kernel"].spec == PartitionSpec(None, "fsdp")
    assert places.v_col["kernel"].spec == PartitionSpec(None, "tensor")
    # optax itself: rows of unequal size show which dimension is left
    grads = {"kernel": jnp.broadcast_to(jnp.arange(1.0, 9.0)[None, :, None], (2, 8, 8))}
    state = made.update(grads, made.init(params), params)[1]
    assert len(set(np.asarray(state.v_row["kernel"][0]))) == 8
    assert len(set(np.asarray(state.v_col["kernel"][0]))) == 1


def test_the_average_begins_as_a_copy_and_only_where_wanted():
    made = optax.identity()
    assert make_state(PARAMS, (), made, False).ema == {}
    with_average = make_state(jax.tree.map(jnp.asarray, PARAMS), (), made, True)
    jax.tree.map(np.testing.assert_array_equal, with_average.ema, with_average.params)
    assert int(with_average.step) == 0
