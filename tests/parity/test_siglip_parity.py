"""SigLIP's image tower alone against transformers: hidden states, the pooled output of its own query, gradients."""

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import tiny
import torch
import transformers
from compare import close, compiled, forward, gradients, run_exported

from vlmjax import hub

SIZES = {
    "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 40,
    "patch_size": 8,
}  # fmt: skip
PIXELS = {"pixel_values": tiny.pixels(2, 40, 40)}


@pytest.fixture(scope="module", params=[True, False], ids=["own query", "no pooling"])
def tower(request, tmp_path_factory):
    """Theirs, ours, its parameters."""
    config = transformers.SiglipVisionConfig(**SIZES, vision_use_head=request.param)
    config._attn_implementation = "eager"
    reference = tiny.redraw(transformers.SiglipVisionModel(config))
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("siglip")))


def test_outputs(tower):
    reference, model, params = tower
    with torch.no_grad():
        expected = reference(**tiny.to_torch(PIXELS))
    out = forward(model, params, PIXELS)
    close(out.last_hidden_state, expected.last_hidden_state, 2e-5)
    if model.config.pool == "none":
        assert out.pooler_output is None and expected.pooler_output is None
    else:
        close(out.pooler_output, expected.pooler_output, 2e-5)


def test_every_gradient(tower):
    reference, model, params = tower

    def loss(params):
        out = model.apply({"params": params}, **PIXELS)
        pooled = 0.0 if out.pooler_output is None else out.pooler_output.sum()
        return (out.last_hidden_state**2).mean() + pooled

    reference.zero_grad()
    out = reference(**tiny.to_torch(PIXELS))
    pooled = 0.0 if out.pooler_output is None else out.pooler_output.sum()
    ((out.last_hidden_state**2).mean() + pooled).backward()
    assert gradients(model, compiled(jax.grad(loss))(params), reference) == len(list(reference.parameters()))


def test_written_and_read_again(tower, tmp_path):
    reference, model, params = tower
    hub.save(model, params, tmp_path)
    again, same = hub.load(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with torch.no_grad():
        expected = reference(**tiny.to_torch(PIXELS)).last_hidden_state
    close(run_exported(transformers.SiglipVisionModel, tmp_path, PIXELS).last_hidden_state, expected, 1e-6)
