"""Tiny models of every family with random parameters, for the tests of this folder."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from vlmjax.hub import folder
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.blip import BlipCaptioner, BlipRetriever
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.blip_tasks import BlipVqa
from vlmjax.models.classifier import Classifier, ClassifierConfig
from vlmjax.models.clip import Clip, ClipConfig, ClipText, ClipVision
from vlmjax.models.decoder import Decoder, DecoderConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.ops.rotary import Rope

IMAGE = VitConfig(width=20, depth=2, heads=5, mlp_dim=28, image_size=24, patch_size=8, activation="gelu")
TEXT = TextConfig(
    width=12, depth=3, heads=3, mlp_dim=20, vocab_size=70, max_length=16, eos_token_id=1, bos_token_id=0, pad_token_id=1
)  # fmt: skip
LLAMA = DecoderConfig(
    width=20, depth=2, heads=4, kv_heads=2, head_dim=6, mlp_dim=28, vocab_size=50, max_length=64,
    rope=Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32), eos_token_ids=(2, 3),
)  # fmt: skip
MISTRAL = DecoderConfig(
    width=12, depth=3, heads=3, kv_heads=1, head_dim=8, mlp_dim=20, vocab_size=50, window=5, family="mistral"
)
QWEN2 = DecoderConfig(
    width=12, depth=2, heads=3, kv_heads=3, head_dim=4, mlp_dim=20, vocab_size=50, qkv_bias=True, tied=True,
    rope=Rope(1e6), bos_token_id=None, eos_token_ids=(), family="qwen2",
)  # fmt: skip
OPT = DecoderConfig(
    width=12, depth=2, heads=3, kv_heads=3, head_dim=4, mlp_dim=20, vocab_size=50, max_length=16, rope=None,
    norm="layer", pre_norm=False, final_norm=False, activation="relu", gated=False, qkv_bias=True, out_bias=True,
    mlp_bias=True, tied=True, embed_dim=10, pad_token_id=1, family="opt",
)  # fmt: skip
BERT = BertConfig(width=12, depth=2, heads=3, mlp_dim=20, vocab_size=50, max_length=16, pad_token_id=-1)
VIT = VitConfig(
    width=20, depth=2, heads=5, mlp_dim=28, image_size=24, patch_size=8, activation="gelu", class_token=True,
    pre_norm=False, patch_bias=True, pool="none", init="normal",
)  # fmt: skip
MED = BertConfig(width=12, depth=2, heads=3, mlp_dim=20, vocab_size=50, max_length=16, type_vocab_size=None)
BLIP = BlipConfig(VIT, MED, 10, bos_token_id=48, enc_token_id=49, sep_token_id=7)

MODELS = {
    "CLIPModel": Clip(ClipConfig(IMAGE, TEXT, 10)),
    "CLIPVisionModel": ClipVision(IMAGE),
    "CLIPVisionModelWithProjection": ClipVision(IMAGE, 10),
    "CLIPTextModel": ClipText(TEXT),
    "CLIPTextModelWithProjection": ClipText(TEXT, 10),
    "BertModel": Bert(BERT),
    "VisionTextDualEncoderModel": Clip(ClipConfig(IMAGE, BERT, 10)),
    "ViTModel": ClipVision(VIT),
    "CLIPForImageClassification": Classifier(ClassifierConfig(IMAGE, ("a", "b", "c"), pool="mean")),
    "ViTForImageClassification": Classifier(ClassifierConfig(VIT, ("a", "b", "c"), ("1", "2", "3"))),
    "BlipForConditionalGeneration": BlipCaptioner(BLIP),
    "BlipForImageTextRetrieval": BlipRetriever(BLIP),
    "BlipForQuestionAnswering": BlipVqa(
        dataclasses.replace(BLIP, text=dataclasses.replace(MED, width=20, heads=5))
    ),
    "LlamaForCausalLM": Decoder(LLAMA),
    "MistralForCausalLM": Decoder(MISTRAL),
    "Qwen2ForCausalLM": Decoder(QWEN2),
    "OPTForCausalLM": Decoder(OPT),
}


@functools.cache
def params_of(name: str) -> dict[str, Any]:
    """Random numpy parameters, every one different."""
    model = MODELS[name]
    rng = np.random.default_rng(len(name))
    shapes = folder.abstract_params(folder.family_of(model), model)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, with the same structure and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
