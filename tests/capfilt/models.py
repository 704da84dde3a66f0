"""A small BLIP with a tokenizer and an image processor, random, as a folder."""

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax import hub
from vlmjax.data import bpe, text
from vlmjax.data.images import EvalTransform
from vlmjax.data.recipe import DEC, ENC
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip, example_inputs
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.vit import VitConfig

WORDS = ["a red star", "a blue circle on grey", "two green hearts", "a picture of a ring"] * 5


def blip(folder, seed=0, **changes):
    """Write it; the folder."""
    bpe.train_bpe(WORDS, 540, str(folder / "tokenizer"), model_max_length=24)
    tokenizer = text.load(folder / "tokenizer", 24)
    for token in (DEC, ENC):
        tokenizer = text.with_token(tokenizer, token)
    image = VitConfig(
        width=16, depth=1, heads=2, mlp_dim=32, image_size=16, patch_size=8, activation="gelu", layer_norm_eps=1e-6,
        class_token=True, pre_norm=False, patch_bias=True, pool="none", init="normal",
    )  # fmt: skip
    config = BlipConfig(
        image=image,
        text=BertConfig(
            width=16, depth=2, heads=2, mlp_dim=32, vocab_size=tokenizer.vocab_size, max_length=24,
            type_vocab_size=None, pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=8, bos_token_id=tokenizer.token_id(DEC), enc_token_id=tokenizer.token_id(ENC),
        sep_token_id=tokenizer.eos_token_id, **changes,
    )  # fmt: skip
    model, rng = Blip(config), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model)))["params"]
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    hub.save(
        model, {**drawn, "temp": jnp.float32(0.07)}, folder / "model", tokenizer=tokenizer,
        image_processor=EvalTransform((16, 16), None),
    )  # fmt: skip
    return folder / "model"
