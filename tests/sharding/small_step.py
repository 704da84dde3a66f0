"""A CLIP or BERT dual encoder small enough to compile in seconds, and its train step as it is on a mesh."""

import jax
import jax.numpy as jnp
import optax
from training import tiny

from vlmjax.models.bert import BertConfig
from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.sharding.mesh import batch_sharding
from vlmjax.stages.contrastive import Contrastive
from vlmjax.training.compile import init_params
from vlmjax.training.state import make_state, state_shardings
from vlmjax.training.step import make_train_step

WIDTH, TOKENS, SIDE = 64, 12, 16


def dual_encoder(kind="clip", **changes):
    """Both towers of width 64, 4 heads and 3 layers; BERT without dropout."""
    sizes = {"width": WIDTH, "depth": 3, "heads": 4, "mlp_dim": 256, **changes}
    words = {"vocab_size": 96, "max_length": TOKENS}
    text = (
        BertConfig(**sizes, **words, dropout=0.0)
        if kind == "bert"
        else TextConfig(**sizes, **words, eos_token_id=95)
    )
    return Clip(ClipConfig(VitConfig(**sizes, image_size=SIDE, patch_size=4), text, projection_dim=32))


def lowered_step(model, mesh, batch):
    """The donated Adam step, lowered for arrays of which there are only shapes."""
    recipe, optimizer = tiny.recipe(), optax.adam(0.1)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    abstract = jax.eval_shape(lambda params: make_state(params, (), optimizer, False), shapes)
    places = state_shardings(abstract, recipe.sharding, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)

    def rows(*shape, dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=batch_sharding(mesh))

    arrays = {
        "pixel_values": rows(SIDE, SIDE, 3, dtype=jnp.uint8),
        "input_ids": rows(TOKENS, dtype=jnp.int32),
        "attention_mask": rows(TOKENS, dtype=jnp.int32),
        "caption_id": rows(dtype=jnp.uint32),
        "valid": rows(dtype=jnp.bool_),
    }
    step = make_train_step(Contrastive(recipe, model, mesh), optimizer, lambda i: 0.1, mesh, seed=0)
    # optax multiplies its int32 counters with floats.
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(state, arrays)
