"""The FLOP formula against the matrix products actually traced, and against known models."""

import math

import jax
import numpy as np
import pytest
from tiny_models import BERT, CLIP, DUAL, TEXT, VIT, change

from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.models.bridges import Bridge, BridgeConfig
from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.flops import (
    blip_nlvr_train_flops,
    blip_train_flops,
    blip_vqa_train_flops,
    bridge_flops,
    forward_flops,
    train_flops,
)
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.text import Text, TextConfig
from vlmjax.models.vit import Vit, VitConfig
from vlmjax.models.vlm import VlmConfig


def traced_flops(jaxpr, times=1):
    """Two operations per multiply-add of every product in a jaxpr, scans counted by their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += traced_flops(inside, times * equation.params.get("length", 1))
    return total


def traced(model, *inputs, **kwargs):
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return traced_flops(jax.make_jaxpr(lambda v: model.apply(v, *inputs, **kwargs))(variables).jaxpr)


PIXELS, IDS = np.zeros((4, 16, 24, 3), np.float32), np.zeros((4, 9), np.int32)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Vit(VIT), (PIXELS,)), (Text(TEXT), (IDS,)), (Bert(BERT), (IDS,)), (Clip(CLIP), (PIXELS, IDS))]
    + [(Clip(DUAL), (PIXELS, IDS))],
    ids=["vit", "text", "bert", "clip", "dual"],
)
def test_equals_the_traced_products(model, inputs):
    assert forward_flops(model.config, 4) == traced(model, *inputs)


WORDS = DecoderConfig(36, 1, 2, 2, 18, 40, 50)
BRIDGES = [
    BridgeConfig("linear"),
    BridgeConfig("mlp", 3),
    BridgeConfig("qformer", qformer=QformerConfig(change(BERT, depth=5, type_vocab_size=None), 4, 2, False)),
]


@pytest.mark.parametrize("bridge", BRIDGES, ids=lambda bridge: bridge.kind)
def test_a_bridge_too(bridge):
    config = VlmConfig(VIT, WORDS, bridge, 49, feature_layers=(-1, 1), keep_class=True)
    features = jax.numpy.zeros((4, 7, 80))
    assert 4 * bridge_flops(config, 7) == traced(Bridge(bridge, 36), features)


def test_text_length_and_patch_dropout():
    assert forward_flops(TEXT, 4, text_length=5) == traced(Text(TEXT), IDS[:, :5])
    config = change(VIT, patch_dropout=0.5)
    train = traced(Vit(config), PIXELS, train=True, rngs={"dropout": jax.random.key(0)})
    assert forward_flops(config, 4, train=True) == train < forward_flops(config, 4)


def test_known_models():
    """Published counts, which give multiply-adds: 4.4 G for ViT-B/32, 81 G for ViT-L/14."""
    base = VitConfig(768, 12, 12, 3072, 224, 32)
    large = VitConfig(1024, 24, 16, 4096, 224, 14)
    assert forward_flops(base, 1) / 1e9 == pytest.approx(2 * 4.4, abs=0.1)
    assert forward_flops(large, 1) / 1e9 == pytest.approx(2 * 81, abs=1)
    clip = ClipConfig(large, TextConfig(768, 12, 12, 3072, 49408), 768)
    # 17.24 PFLOP per training step of 32,768 pairs, logits included.
    assert 3 * forward_flops(clip, 32768) / 1e15 == pytest.approx(17.24, rel=0.03)
    assert forward_flops(BertConfig(768, 12, 12, 3072, 30522), 1, text_length=128) / 1e9 == pytest.approx(
        22.4, abs=0.5
    )


def test_a_locked_tower_runs_forward_alone():
    image, text = (
        VitConfig(8, 1, 2, 16, 16, 8, patch_dropout=0.5),
        TextConfig(8, 1, 2, 16, 20, 8, eos_token_id=19),
    )
    clip = ClipConfig(image, text, 8)
    whole, towers = train_flops(clip, 4), {name: getattr(clip, name) for name in ("image", "text")}
    assert whole == 3 * forward_flops(clip, 4, train=True)
    for name, config in towers.items():
        assert train_flops(clip, 4, locked=[name]) == whole - 2 * forward_flops(config, 4, train=True)
    rest = forward_flops(clip, 4, train=True) - sum(forward_flops(c, 4, train=True) for c in towers.values())
    assert train_flops(clip, 4, locked=["image", "text"]) == whole - 2 * (whole // 3 - rest)


def test_blip_answers_and_judges():
    """Three answers of each question side by side; two images of each statement."""
    image = VitConfig(
        24, 2, 2, 40, 16, 8, "gelu", class_token=True, pre_norm=False, patch_bias=True, pool="none"
    )
    config = BlipConfig(image, BertConfig(16, 4, 2, 24, 43, 9, None), 8, 40, 41, 42)
    pixels, ids, answers = np.zeros((4, 16, 16, 3), np.float32), IDS[:, :7], np.zeros((12, 5), np.int32)
    model = BlipVqa(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), pixels, ids, None, answers[:4])

    def ask(module):
        states = module.encode_question(module.encode_image(pixels), ids)
        return module.logits(module.decode_answer(states, None, answers))

    found = traced_flops(jax.make_jaxpr(lambda v: model.apply(v, method=ask))(variables).jaxpr)
    assert (
        blip_vqa_train_flops(config, 4, 7, 3, 5, trained=("vision_model", "text_encoder", "text_decoder"))
        == 3 * found
    )
    only = blip_vqa_train_flops(config, 4, 7, 3, 5, trained=("text_decoder",))
    assert found < only < 3 * found
    judged = traced(BlipNlvr(config), np.stack([pixels, pixels], axis=1), ids)
    head = 4 * 2 * 16 * (16 + 2)  # not counted: it looks at one token
    merged = 2 * (4 * 7) * 2 * 2 * 16 * 16  # nor are the projections that merge, in half of the layers
    counted = blip_nlvr_train_flops(config, 4, 7, trained=("vision_model", "text_encoder"))
    assert counted == 3 * (judged - head - merged)


def test_blip_counts_the_losses_that_are_made():
    image = VitConfig(
        24, 2, 2, 40, 16, 8, "gelu", class_token=True, pre_norm=False, patch_bias=True, pool="none"
    )
    config = BlipConfig(image, BertConfig(16, 4, 2, 24, 43, 9, None), 8, 40, 41, 42)
    whole = blip_train_flops(config, 4, 7, momentum=True)
    without = [blip_train_flops(config, 4, 7, momentum=True, **{name: False}) for name in ("itm", "lm")]
    alone = blip_train_flops(config, 4, 7, momentum=False, itm=False, lm=False)
    assert alone < min(without) and max(without) < whole
    # Three texts are matched and one is written, whose words are scored besides.
    scores = 3 * 4 * 2 * 7 * 16 * (16 + 43)
    assert whole - without[0] == 3 * (whole - without[1] - scores)
