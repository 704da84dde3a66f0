"""BlipForImageTextRetrieval: matching and cosine scores, gradients, files; and the files of a model in pretraining."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import torch
import transformers
from compare import close, compiled, gradients

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import folder
from vlmjax.models.blip import Blip, BlipCaptioner, BlipRetriever, example_inputs
from vlmjax.models.blip_start import from_pretraining

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """transformers' model, ours, its parameters."""
    reference = tiny_blip.retriever()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("blip")))


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": tiny_blip.images(), **tiny_blip.texts(first=3)}


@pytest.mark.parametrize("use_itm_head", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores(trio, use_itm_head, side):
    reference, model, params = trio
    inputs = {"pixel_values": tiny_blip.images(), **tiny_blip.texts(side, first=3)}
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs), use_itm_head=use_itm_head).itm_score
    found = compiled(lambda p, x: model.apply({"params": p}, **x, use_itm_head=use_itm_head))(params, inputs)
    close(found, expected, TOLERANCE)
    assert np.ptp(np.asarray(found)) > 0.05


@pytest.mark.slow
def test_every_gradient(trio, inputs):
    """Of both scores together, each in some direction: every parameter but the temperature has one."""
    reference, model, params = trio
    rng, kinds = np.random.default_rng(0), (True, False)
    weights = [rng.normal(size=(3, columns)).astype(np.float32) for columns in (2, 3)]
    reference.zero_grad()
    for kind, weight in zip(kinds, weights, strict=True):
        scores = reference(**tiny.to_torch(inputs), use_itm_head=kind).itm_score
        (scores * torch.from_numpy(weight)).sum().backward()

    def loss(params):
        scores = [model.apply({"params": params}, **inputs, use_itm_head=kind) for kind in kinds]
        return sum((score * weight).sum() for score, weight in zip(scores, weights, strict=True))

    grads = compiled(jax.grad(loss))(params)
    assert float(grads.pop("temp")) == 0.0
    assert gradients(model, grads, reference) == len(list(reference.named_parameters()))


def test_what_is_seen(trio, inputs):
    """A text alone is blind to images; with one it sees all of it; padding is never seen."""
    _, model, params = trio
    pixels, texts = inputs["pixel_values"], {k: inputs[k] for k in ("input_ids", "attention_mask")}

    def states(module, pixels, texts):
        images = module.encode_image(pixels)
        return module.encode_text(**texts), module.encode_multimodal(images, **texts)

    apply = compiled(lambda p, *x: model.apply({"params": p}, *x, method=states))
    alone, joint = apply(params, pixels, texts)
    corner = pixels.copy()
    corner[:, -1, -1] += 1.0
    same, other = apply(params, corner, texts)
    np.testing.assert_array_equal(alone, same)
    assert np.abs(np.asarray(joint - other)).max() > 1e-4
    padded = texts | {"input_ids": np.where(texts["attention_mask"] == 1, texts["input_ids"], 33)}
    real = texts["attention_mask"] == 1
    for before, after in zip((alone, joint), apply(params, pixels, padded), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[real], np.asarray(after)[real])


@pytest.mark.slow
def test_features(trio, inputs):
    reference, model, params = trio

    def features(mode):
        return model.apply({"params": params}, mode, **inputs, method="features")

    torched = tiny.to_torch(inputs)
    with torch.no_grad():
        images = reference.vision_model(torched["pixel_values"]).last_hidden_state
        texts = reference.text_encoder(torched["input_ids"], torched["attention_mask"]).last_hidden_state
        joint = reference.text_encoder(
            torched["input_ids"], torched["attention_mask"], encoder_hidden_states=images
        ).last_hidden_state
        unit = torch.nn.functional.normalize
        wanted = {
            "image": {"image_embeds": images, "image_features": unit(reference.vision_proj(images), dim=-1)},
            "text": {"text_embeds": texts, "text_features": unit(reference.text_proj(texts), dim=-1)},
            "multimodal": {"image_embeds": images, "multimodal_embeds": joint},
        }
    for mode, fields in wanted.items():
        found = features(mode)
        for field, value in vars(found).items():
            assert (value is None) == (field not in fields), (mode, field)
        for field, value in fields.items():
            close(getattr(found, field), value, TOLERANCE, field)


def test_written_read_and_written_again_is_the_same(trio, inputs, tmp_path):
    reference, model, params = trio
    params = params | {"temp": np.float32(0.0312)}
    hub.save(model, params, tmp_path / "one")
    again, same = hub.load(tmp_path / "one")
    assert type(again) is BlipRetriever and again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    hub.save(again, same, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    read, info = transformers.BlipForImageTextRetrieval.from_pretrained(
        tmp_path / "one", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = reference.state_dict(), read.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def pretraining(model, seed=0):
    """A Blip of the retriever's shape, and random parameters."""
    whole = Blip(model.config)
    shapes = jax.eval_shape(lambda: whole.init(jax.random.key(0), **example_inputs(whole)))["params"]
    rng = np.random.default_rng(seed)
    return whole, jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def test_a_model_in_pretraining_is_a_retriever_with_its_decoder_beside(trio, tmp_path):
    whole, params = pretraining(trio[1])
    hub.save(whole, params, tmp_path)
    again, same = hub.load(tmp_path)
    assert type(again) is Blip and again.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    _, info = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    (tmp_path / folder.EXTRA).unlink()
    with pytest.raises(HubError, match=folder.EXTRA):
        hub.load(tmp_path)
    retriever = BlipRetriever(whole.config)
    half = from_pretraining(retriever, shapes_of(retriever), whole, params)
    hub.save(retriever, half, tmp_path)
    assert type(hub.load(tmp_path)[0]) is BlipRetriever
    assert "vlmjax_form" not in json.loads((tmp_path / "config.json").read_text())


def shapes_of(model):
    return folder.abstract_params(folder.family_of(model), model)


def test_both_halves_of_a_model_in_pretraining_compute_what_it_does(trio, inputs, tmp_path):
    """Shared parts are written twice, and transformers reads both."""
    whole, params = pretraining(trio[1])

    def both(module):
        states = module.encode_image(inputs["pixel_values"])
        texts = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        written = module.logits(module.decode_text(states, **texts))
        return module.match(states, **texts), written

    matched, written = (
        np.asarray(x) for x in compiled(lambda p: whole.apply({"params": p}, method=both))(params)
    )
    torched = tiny.to_torch(inputs)
    for form, cls, first in (
        (BlipRetriever, transformers.BlipForImageTextRetrieval, None),
        (BlipCaptioner, transformers.BlipForConditionalGeneration, tiny_blip.DEC),
    ):
        half = form(whole.config)
        hub.save(half, from_pretraining(half, shapes_of(half), whole, params), tmp_path / form.__name__)
        reference = cls.from_pretrained(tmp_path / form.__name__).eval()
        ids = torched["input_ids"].clone()
        if first is not None:
            ids[:, 0] = first
        with torch.no_grad():
            out = reference(**(torched | {"input_ids": ids}))
        if first is None:
            close(matched, out.itm_score, TOLERANCE)
        else:
            real = inputs["attention_mask"] == 1
            close(written[real], out.logits.numpy()[real], TOLERANCE)
