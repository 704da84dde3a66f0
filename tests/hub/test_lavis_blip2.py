"""LAVIS' files of BLIP-2's first stage, read without PyTorch: with the tower in them, or in a file of its own."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from vlmjax.errors import HubError
from vlmjax.hub import blip2, lavis_blip2, table
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip2 import Blip2, example_inputs
from vlmjax.models.blip2_config import Blip2Config, blip2_vit
from vlmjax.models.clip import ClipVision
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig

BERT = BertConfig(128, 5, 2, 24, vocab_size=120, max_length=10, type_vocab_size=None)
EVA = blip2_vit("eva-g", 8, width=176, depth=2, heads=2, mlp_dim=40, patch_size=4)
CONFIG = Blip2Config(EVA, QformerConfig(BERT, queries=3), 12, bos_token_id=119)
NAMES = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "ln_vision"),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection", r"visual_encoder.blocks.\1.attn.proj"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn", r"visual_encoder.blocks.\1.attn"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp", r"visual_encoder.blocks.\1.mlp"),
    ("^qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    ("^embeddings", "Qformer.bert.embeddings"),
    ("^qformer", "Qformer.bert"),
    ("^cls", "Qformer.cls"),
    (r"(attention|crossattention)\.attention", r"\1.self"),
    ("_projection", "_proj"),
)


def params_of(config, seed=1):
    model, rng = Blip2(config), np.random.default_rng(seed)
    inputs = example_inputs(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    layers = params["vision_model"]["encoder"]["layers"]["self_attn"]
    layers["k_proj"]["bias"] = np.zeros_like(layers["k_proj"]["bias"])
    return params


def tensors_of(config, params):
    """A state_dict as LAVIS keeps it."""
    model = Blip2(config)
    rest = {name: value for name, value in params.items() if name != "temp"}
    written = table.write(blip2.retrieval_rows(model), rest, rest)
    found = {}
    for name, tensor in written.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        value = torch.from_numpy(np.ascontiguousarray(tensor.make()))
        if name.endswith("attn.qkv.bias"):
            query, key, value = value.chunk(3)
            assert not key.any()
            found |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
        else:
            found[name] = value
    words = found["Qformer.bert.embeddings.word_embeddings.weight"]
    found["Qformer.cls.predictions.decoder.weight"] = words
    found["Qformer.cls.predictions.decoder.bias"] = found["Qformer.cls.predictions.bias"]
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(10)[None]
    return found | {"temp": torch.tensor(0.0213)}


def without_tower(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("visual_encoder.")}


def same(found, params):
    params = params | {"temp": np.float32(0.0213)}
    return models.same(found, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def params():
    return params_of(CONFIG)


@pytest.fixture(scope="module")
def tensors(params):
    return tensors_of(CONFIG, params)


def test_a_file_comes_back_bit_equal(params, tensors, tmp_path):
    torch.save({"model": tensors, "optimizer": {"lr": 1.0}, "epoch": 3}, tmp_path / "blip2.pth")
    model, found = lavis_blip2.load_lavis_blip2(tmp_path / "blip2.pth")
    assert type(model) is Blip2 and model.config == CONFIG
    assert same(found, params)


def test_a_tower_in_a_file_of_its_own(params, tensors, tmp_path):
    """EVA's file has a block more, a norm after the blocks and a classifier."""
    torch.save({"model": without_tower(tensors)}, tmp_path / "blip2.pth")
    longer = params_of(dataclasses.replace(CONFIG, image=dataclasses.replace(EVA, depth=3)), seed=2)
    longer["vision_model"] = jax.tree.map(
        lambda long, short: np.concatenate([short, long[2:]]) if len(short) == 2 else short,
        longer["vision_model"],
        params["vision_model"],
    )
    theirs = tensors_of(dataclasses.replace(CONFIG, image=dataclasses.replace(EVA, depth=3)), longer)
    prefix = "visual_encoder."
    tower = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
    tower |= {"norm.weight": torch.ones(176), "norm.bias": torch.ones(176), "head.weight": torch.ones(2, 176)}
    torch.save(tower, tmp_path / "eva.pth")
    image = lavis_blip2.load_eva(tmp_path / "eva.pth", depth=2)
    model, found = lavis_blip2.load_lavis_blip2(tmp_path / "blip2.pth", image)
    assert model.config == CONFIG
    assert same(found, params)
    assert lavis_blip2.load_eva(tmp_path / "eva.pth")[0].depth == 3


def test_a_tower_of_clip_gives_all_but_its_last_block(tensors, tmp_path):
    torch.save({"model": without_tower(tensors)}, tmp_path / "blip2.pth")
    clip = VitConfig(176, 3, 2, 40, image_size=8, patch_size=4)
    pixels = np.zeros((1, 8, 8, 3), np.float32)
    tower = jax.jit(ClipVision(clip).init)(jax.random.key(0), pixels)["params"]
    model, found = lavis_blip2.load_lavis_blip2(tmp_path / "blip2.pth", (clip, tower))
    assert (model.config.image.depth, model.config.image.pre_norm) == (2, True)
    inputs = example_inputs(model)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (found, expected)]
    assert shapes[0] == shapes[1]
    part = found["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(
        part, tower["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"][:2]
    )


def test_what_is_refused(tensors, tmp_path):
    torch.save(without_tower(tensors), tmp_path / "blip2.pth")
    with pytest.raises(HubError, match="holds no image tower.*load_eva"):
        lavis_blip2.load_lavis_blip2(tmp_path / "blip2.pth")
    for name, message in (
        ("query_tokens", "query_tokens' is missing"),
        ("Qformer.bert.encoder.layer.4.output_query.dense.weight", "layer.4.output_query.dense.weight"),
        ("visual_encoder.blocks.1.attn.v_bias", "layers.1.self_attn.v_bias"),
    ):
        torch.save({key: value for key, value in tensors.items() if key != name}, tmp_path / "cut.pth")
        with pytest.raises(HubError, match=message):
            lavis_blip2.load_lavis_blip2(tmp_path / "cut.pth")
    torch.save(tensors | {"more.weight": torch.ones(2)}, tmp_path / "more.pth")
    with pytest.raises(HubError, match=r"1 left over: more\.weight"):
        lavis_blip2.load_lavis_blip2(tmp_path / "more.pth")
