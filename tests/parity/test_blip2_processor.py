"""BLIP-2's processor: what transformers opens of folders of ours, of either stage."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip2
import tokenizers
import torch
import transformers
from PIL import Image

from vlmjax import decode, evaluate, hub
from vlmjax.data import text
from vlmjax.data.conversation import MARK
from vlmjax.data.images import EvalTransform
from vlmjax.errors import HubError, UserError
from vlmjax.hub import blip2
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vlm import Vlm, VlmConfig, example_inputs

PLAIN = EvalTransform(size=(15, 15), crop=None)
WORDS = ["[PAD]", "a", "picture", "of", "dog", "cat", "red", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 41, 3), dtype=np.uint8))


def test_of_the_first_stage(image, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *(f"w{i}" for i in range(41))]) + "\n")
    model, params = hub.load(tiny.folder_of(tiny_blip2.retriever(), tmp_path / "theirs"))
    hub.save(model, params, tmp_path / "ours", text.load(tmp_path, 17), PLAIN)
    tokenizer, transform = hub.load_processor(tmp_path / "ours")
    assert transform == PLAIN and tokenizer.max_length == 17
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, transformers.Blip2Processor)
    found = processor(images=image, text="a picture of", return_tensors="np")
    assert found["input_ids"].tolist() == [tokenizer.encode("a picture of")] == [[8, 1, 2, 3, 7]]
    ours = transform.normalize(transform(np.asarray(image)))
    np.testing.assert_allclose(found["pixel_values"][0].transpose(1, 2, 0), ours, atol=0.02)
    with pytest.raises(HubError, match="squeezes whole images"):
        hub.save(model, params, tmp_path / "ours", None, EvalTransform(size=15, crop=(15, 15)))


def opt_like(folder):
    """An opening token, bytes, and the placeholder."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "<pad>", "</s>", MARK],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["a photo of a grey seal"] * 9, trainer)
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    roles = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **roles).save_pretrained(folder)
    return text.load(folder, 40)


def test_of_the_second_stage(image, tmp_path):
    """Placeholders, opening token, words; and the captions of both sides are one."""
    tokenizer = opt_like(tmp_path / "words")
    theirs = tiny_blip2.config()
    form = {
        "rope": None,
        "norm": "layer",
        "activation": "relu",
        "gated": False,
        "tied": True,
        "family": "opt",
    }
    form |= {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "bos_token_id": 2, "pad_token_id": 1}
    words = DecoderConfig(30, 2, 5, 5, 6, 48, tokenizer.vocab_size, max_length=40, **form)
    first = blip2.to_qformer(theirs.qformer_config.to_dict(), tiny_blip2.QUERIES)
    bridge = BridgeConfig("qformer", qformer=QformerConfig(first.bert, 5, 2, False), norm_eps=1e-6)
    tower = blip2.to_image(theirs.vision_config.to_dict())
    model = Vlm(VlmConfig(tower, words, bridge, tokenizer.token_id(MARK), (-1,), keep_class=True))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model.config)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    hub.save(model, params, tmp_path / "ours", tokenizer, PLAIN)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, transformers.Blip2Processor)
    asked = processor(images=image, text="a photo of", return_tensors="pt")
    ids = [tokenizer.token_id(MARK)] * 5 + tokenizer.encode("a photo of")
    assert asked["input_ids"].tolist() == [ids] and ids[5] == 2
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = reference.generate(**asked, max_new_tokens=6, do_sample=False, num_beams=1)
    pixels = asked["pixel_values"].numpy().transpose(0, 2, 3, 1)[:, None]
    inputs = {"input_ids": np.array([ids], np.int32), "pixel_values": pixels}
    found = decode.generate(model, params, **inputs, max_new_tokens=6, eos_token_id=2, pad_token_id=1)
    assert wanted[0, len(ids) :].tolist() == np.asarray(found)[0, : wanted.shape[1] - len(ids)].tolist()
    with pytest.raises(UserError, match="is a BLIP-2, which takes images before a text"):
        evaluate.read_model(str(tmp_path / "ours"))
