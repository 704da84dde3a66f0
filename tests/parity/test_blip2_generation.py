"""Blip2ForConditionalGeneration around OPT, T5 and Llama: logits, gradients, what is written, files both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import tiny_blip2
import tiny_t5
import torch
import transformers
from compare import close, compiled, gradients

from vlmjax import decode, hub
from vlmjax.errors import HubError, UserError
from vlmjax.hub import folder
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.t5 import decoder_ids
from vlmjax.models.vlm import Seq2SeqVlm, Vlm, deal
from vlmjax.models.vlm import example_inputs as inputs_of

TOLERANCE, IMAGE, WORDS, QUERIES = 1e-4, 70, 71, tiny_blip2.QUERIES
SMALL = {"vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 40}
OPT = SMALL | {
    "model_type": "opt", "hidden_size": 30, "ffn_dim": 48, "num_attention_heads": 5, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
LLAMA = SMALL | {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 52, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False,
}  # fmt: skip
T5 = (
    tiny_t5.SIZES
    | tiny_t5.CASES["flan: gelu_new, a head of its own"]
    | {"model_type": "t5", "vocab_size": WORDS}
)
LANGUAGES = {"opt": OPT, "llama": LLAMA, "t5": T5}
EVERY = pytest.mark.parametrize("name", list(LANGUAGES))
PAD = {"opt": 1, "llama": 1, "t5": 0}


@functools.cache
def reference_of(name):
    config = tiny_blip2.config(language=LANGUAGES[name], image_token_index=IMAGE)
    model = tiny_blip.redraw(transformers.Blip2ForConditionalGeneration(config), 5)
    if name == "t5":
        tiny_t5.redraw(model.language_model, 6)
    return model


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function from a case to our model and its parameters."""
    return functools.cache(
        lambda name: hub.load(tiny.folder_of(reference_of(name), tmp_path_factory.mktemp("blip2")))
    )


def batch(name, side="right"):
    """Three rows: an image before all, an image within, and two; as transformers takes them."""
    rng, rows = np.random.default_rng(7), []
    for before, images, after in ((0, 1, 6), (3, 1, 2), (1, 2, 4)):
        words = rng.integers(4, 69, before + after).tolist()
        rows.append([*words[:before], *[IMAGE] * QUERIES * images, *words[before:]])
    longest = max(map(len, rows))
    ids, mask = np.full((3, longest), PAD[name], np.int32), np.zeros((3, longest), np.int32)
    for row, tokens in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": tiny_blip2.images(4)}


def ours_of(model, inputs):
    """The same with images dealt out to their rows."""
    return {**inputs, "pixel_values": deal(model.config, inputs["input_ids"], inputs["pixel_values"])}


def answers():
    labels = tiny_t5.labels()[:, :8]
    return np.where(labels >= WORDS - 1, 5, labels)


def scores_of(model, params, inputs):
    """Logits, from the language model's own method."""
    if isinstance(model, Seq2SeqVlm):
        return model.apply(
            {"params": params}, **inputs, decoder_input_ids=decoder_ids(answers(), model.config.text)
        )
    return model.apply({"params": params}, **inputs, method="causal_lm")


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(name, side, load):
    model, params = load(name)
    inputs = batch(name, side)
    asked = inputs | ({"labels": answers()} if name == "t5" else {})
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(asked)).logits.numpy()
    found = compiled(lambda p, x: scores_of(model, p, x))(params, ours_of(model, inputs))
    real = answers() != -100 if name == "t5" else inputs["attention_mask"] == 1
    close(np.asarray(found)[real], expected[real], TOLERANCE)


@EVERY
@pytest.mark.slow
def test_loss_and_every_gradient(name, load):
    model, params = load(name)
    assert type(model) is (Seq2SeqVlm if name == "t5" else Vlm)
    inputs, reference = batch(name), reference_of(name)
    counted = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != IMAGE)
    labels = answers() if name == "t5" else np.where(counted, inputs["input_ids"], -100)
    reference.zero_grad()
    out = reference(**tiny.to_torch(inputs | {"labels": labels}))
    out.loss.backward()
    wanted = labels if name == "t5" else labels[:, 1:]

    def loss(params):
        scores = scores_of(model, params, ours_of(model, inputs))
        logs = jax.nn.log_softmax(scores if name == "t5" else scores[:, :-1])
        right = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=2)[..., 0]
        return -jnp.where(wanted >= 0, right, 0.0).sum() / float((wanted >= 0).sum()), scores

    (value, scores), grads = compiled(jax.value_and_grad(loss, has_aux=True))(params)
    real = labels != -100 if name == "t5" else inputs["attention_mask"] == 1
    close(np.asarray(scores)[real], out.logits.detach().numpy()[real], TOLERANCE)
    close(value, out.loss, TOLERANCE)
    assert gradients(model, grads, reference) == len(list(reference.parameters()))


@EVERY
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_written(name, beams, load):
    model, params = load(name)
    inputs = batch(name, "left")
    end = reference_of(name).config.text_config.eos_token_id
    given = {"num_beams": beams, "do_sample": False, "max_new_tokens": 6, "length_penalty": -1.0}
    expected = reference_of(name).generate(**tiny.to_torch(inputs), **given).numpy()
    expected = expected[:, 1:] if name == "t5" else expected[:, inputs["input_ids"].shape[1] :]
    pad = PAD[name] or (end if beams > 1 else 0)  # decode/beams.py
    found = decode.generate(
        model, params, **ours_of(model, inputs), **given, eos_token_id=end, pad_token_id=pad
    )
    np.testing.assert_array_equal(np.asarray(found)[:, : expected.shape[1]], expected)
    assert len(np.unique(expected)) > 4


@EVERY
def test_an_exported_folder_is_the_one_that_was_read(name, load, tmp_path):
    """transformers loads it without a word; read again, no bit has changed."""
    model, params = load(name)
    hub.save(model, params, tmp_path)
    cls = transformers.Blip2ForConditionalGeneration
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    theirs = reference_of(name).state_dict()
    assert theirs.keys() == loaded.state_dict().keys()
    for key, value in theirs.items():
        assert torch.equal(loaded.state_dict()[key], value), key
    inputs = tiny.to_torch(batch(name) | ({"labels": answers()} if name == "t5" else {}))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, reference_of(name)(**inputs).logits)
    again, same = hub.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), same, params))


def empty(model):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs_of(model.config)))["params"]
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def test_what_the_class_cannot_express_is_refused(load, tmp_path):
    model, _ = load("opt")
    narrow = folder.replace(model.config.text, embed_dim=20, pre_norm=False, final_norm=False)
    config = model.config
    for changed, message in (
        (folder.replace(config, text=narrow), "embedding of width 20 in a model of width 30 .OPT-350m"),
        (folder.replace(config, feature_layers=(-2,)), "feature_layers"),
        (folder.replace(config, image=folder.replace(config.image, pre_norm=True)), "pre_norm False only"),
    ):
        with pytest.raises(HubError, match=message):
            hub.save(Vlm(changed), empty(Vlm(changed)), tmp_path)
    other = Seq2SeqVlm(folder.replace(load("t5")[0].config, bridge=BridgeConfig("linear")))
    with pytest.raises(HubError, match="bridge of kind 'linear' before a T5"):
        hub.save(other, empty(other), tmp_path)


def test_what_a_folder_may_not_say(load, tmp_path):
    hub.save(*load("opt"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"image_token_index": None}, "from before images had placeholders"),
        ({"text_config": config["text_config"] | {"word_embed_proj_dim": 20}}, "embedding of width 20"),
        ({"text_config": {"model_type": "bloom"}}, "model_type is 'bloom'"),
        (
            {"qformer_config": config["qformer_config"] | {"use_qformer_text_input": True}},
            "gives its Q-Former no text",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(HubError, match=message):
            hub.load(tmp_path)


def test_placeholders_that_do_not_fit_are_refused(load):
    for name in ("opt", "t5"):
        model, params = load(name)
        inputs = ours_of(model, batch(name))
        ids = inputs["input_ids"].copy()
        ids[0, 0] = 9
        with pytest.raises(UserError, match="row 0 has 4 image placeholders"):
            decode.generate(model, params, **(inputs | {"input_ids": ids}), max_new_tokens=2)
