"""Every tower over `fsdp` and `tensor`: its parameters really are cut, and its numbers are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec
from sharding.small_step import SIDE, TOKENS, dual_encoder

from tests.models import tiny_models
from vlmjax.config import TOWER_SHARDING
from vlmjax.losses.contrastive import info_nce
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_sharding, make_mesh
from vlmjax.sharding.rules import shardings

BATCH = 8
MESHES = [(2, 2, 2), (2, 1, 4)]
INPUTS = {
    "pixel_values": np.random.default_rng(1).normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32),
    "input_ids": np.random.default_rng(2).integers(0, 95, (BATCH, TOKENS)).astype(np.int32),
    "attention_mask": (np.arange(TOKENS)[None, :] < np.arange(5, 5 + BATCH)[:, None]).astype(np.int32),
}
INPUTS["input_ids"][:, 4] = 95  # the end of the text


@pytest.fixture(scope="module", params=["clip", "bert"])
def system(request):
    """A model, its parameters on the host, and loss and gradients of one device."""
    model = dual_encoder(request.param, depth=2)
    params = tiny_models.make_params(model, **INPUTS)
    # Small enough that the loss is far from 0 and all of it has a gradient.
    params = {**params, "logit_scale": jnp.float32(1.0)}
    return model, params, jax.jit(value_and_grad(model))(params, INPUTS)


def value_and_grad(model):
    def loss(params, inputs):
        out = model.apply({"params": params}, **inputs)
        return info_nce(out.image_embeds, out.text_embeds, jnp.exp(params["logit_scale"]))[0]

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("sizes", MESHES)
def test_numbers_are_those_of_one_device(system, sizes):
    model, params, (loss, grads) = system
    mesh = make_mesh(*sizes)
    places = shardings(TOWER_SHARDING, params, mesh)
    step = jax.jit(on_mesh(mesh)(value_and_grad(model)), out_shardings=(None, places))
    found, cut = step(jax.device_put(params, places), jax.device_put(INPUTS, batch_sharding(mesh)))
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for path, expected in traverse_util.flatten_dict(grads, sep="/").items():
        got = traverse_util.flatten_dict(cut, sep="/")[path]
        largest = np.abs(expected).max()
        assert largest > 0 or path.endswith(("key/bias", "k_proj/bias", "token_type_embeddings")), path
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * max(largest, 0.1), err_msg=path)


def test_every_kernel_of_a_layer_is_cut_by_both_axes(system):
    """Column-parallel into attention and MLP (their biases too), row-parallel out of them."""
    _, params, _ = system
    mesh = make_mesh(1, 2, 4)
    places = traverse_util.flatten_dict(shardings(TOWER_SHARDING, params, mesh), sep="/")
    into, out = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    layers = {path: place.spec for path, place in places.items() if "/layer" in path}
    kernels = {path: spec for path, spec in layers.items() if path.endswith("/kernel")}
    assert sorted(path.split("/")[0] for path in kernels) == ["text_model"] * 6 + ["vision_model"] * 6
    for path, spec in kernels.items():
        leads_out = path.endswith(("out_proj/kernel", "fc2/kernel", "output/dense/kernel"))
        assert spec == (out if leads_out else into), path
        bias = layers[path.replace("kernel", "bias")]
        assert bias == (PartitionSpec() if leads_out else PartitionSpec(None, "tensor")), path
    rest = [place.spec for path, place in places.items() if path not in layers]
    assert not any("tensor" in spec for spec in rest)
