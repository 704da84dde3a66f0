"""CLIPModel and its halves: outputs, loss and all gradients equal transformers'."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import torch
import transformers
from compare import check_clip_gradients, check_clip_outputs, close, compiled, forward, run_exported

from vlmjax import hub
from vlmjax.hub import table


def inputs_for(name, batch=5):
    case = tiny.CLIPS[name]
    side, text = case["vision"]["image_size"], case["text"]
    # Under the older rule pooling is at the largest id, which the tokenizer makes the end of text.
    eos = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    ids, mask = tiny.texts(batch, text["max_position_embeddings"], text["vocab_size"], eos)
    return {"pixel_values": tiny.pixels(batch, side, side), "input_ids": ids, "attention_mask": mask}


class Pair(NamedTuple):
    """One model on both sides, and what each makes of the same inputs."""

    name: str
    reference: Any
    folder: Path
    model: Any
    params: Any
    inputs: dict[str, Any]
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=list(tiny.CLIPS))
def pair(request, tmp_path_factory):
    reference = tiny.clip(request.param)
    path = tiny.folder_of(reference, tmp_path_factory.mktemp("clip"))
    model, params = hub.load(path)
    inputs = inputs_for(request.param)
    with torch.no_grad():
        theirs = reference(**tiny.to_torch(inputs))
    return Pair(request.param, reference, path, model, params, inputs, forward(model, params, inputs), theirs)


def test_outputs(pair):
    check_clip_outputs(pair.ours, pair.theirs)


def test_without_attention_mask_and_with_positions(pair):
    ids = pair.inputs["input_ids"]
    words = {"input_ids": ids, "position_ids": np.arange(ids.shape[1], dtype=np.int32)[None, ::-1].copy()}
    with torch.no_grad():
        expected = pair.reference.get_text_features(**tiny.to_torch(words))
    out = forward(pair.model, pair.params, words)
    close(out.text_model_output.last_hidden_state, expected.last_hidden_state)
    close(out.text_embeds, torch.nn.functional.normalize(expected.pooler_output, dim=-1))


def test_loss_and_every_gradient(pair):
    check_clip_gradients(pair.model, pair.params, pair.reference, pair.inputs)


def test_images_of_another_shape(pair):
    """A grid that is not square, with pixels left over: positions and their gradient pass the bicubic kernel."""
    images = tiny.pixels(2, 71, 45)
    pair.reference.zero_grad()
    features = pair.reference.get_image_features(
        **tiny.to_torch({"pixel_values": images}), interpolate_pos_encoding=True
    )
    expected = torch.nn.functional.normalize(features.pooler_output, dim=-1)
    expected[:, 0].sum().backward()

    def first(params):
        embeds = pair.model.apply({"params": params}, images, method="encode_image")
        return embeds[:, 0].sum(), embeds

    grads, embeds = compiled(jax.grad(first, has_aux=True))(pair.params)
    close(embeds, expected)
    table = pair.reference.vision_model.embeddings.position_embedding.weight.grad
    close(grads["vision_model"]["embeddings"]["position_embedding"], table)


def test_exported_folder_gives_the_same_in_transformers(pair, tmp_path):
    hub.save(pair.model, pair.params, tmp_path)
    for cls in (transformers.CLIPModel, transformers.AutoModel):
        theirs = run_exported(cls, tmp_path, pair.inputs)
        for field in ("image_embeds", "text_embeds", "logits_per_image"):
            close(getattr(theirs, field), getattr(pair.ours, field), 1e-5, field)


def test_configuration_comes_back_unchanged(pair, tmp_path):
    hub.save(pair.model, pair.params, tmp_path)
    expected, got = tiny.clip_config(pair.name), transformers.CLIPConfig.from_pretrained(tmp_path)
    assert got.projection_dim == expected.projection_dim
    for part in ("vision_config", "text_config"):
        before, after = (getattr(config, part).to_dict() for config in (expected, got))
        for volatile in ("transformers_version", "dtype"):
            before.pop(volatile, None), after.pop(volatile, None)
        assert after == before
    assert hub.load(tmp_path)[0].config == pair.model.config


@pytest.mark.parametrize("projected", [False, True])
def test_vision_only(projected, tmp_path):
    name = next(iter(tiny.CLIPS))
    cls = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    images = {"pixel_values": inputs_for(name)["pixel_values"]}
    check_tower(cls, tiny.clip_config(name).vision_config, images, "image_embeds", projected, tmp_path)


@pytest.mark.parametrize("projected", [False, True])
def test_text_only(projected, tmp_path):
    name = list(tiny.CLIPS)[1]
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    words = {key: value for key, value in inputs_for(name).items() if key != "pixel_values"}
    check_tower(cls, tiny.clip_config(name).text_config, words, "text_embeds", projected, tmp_path)


def check_tower(cls, config, inputs, embeds, projected, tmp_path):
    """Both ways: transformers' folder gives the same here, ours gives the same there."""
    reference = tiny.redraw(cls(config))
    model, params = hub.load(tiny.folder_of(reference, tmp_path / "theirs"))
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs))
    ours = forward(model, params, inputs)
    hub.save(model, params, tmp_path / "ours")
    exported = run_exported(cls, tmp_path / "ours", inputs)
    for field in ["last_hidden_state", embeds if projected else "pooler_output"]:
        close(getattr(ours, field), getattr(expected, field), what=field)
        close(getattr(ours, field), getattr(exported, field), 1e-5, field)


def test_a_tower_is_cut_out_of_a_whole_clip(pair):
    vision, vision_params = hub.load(pair.folder, architecture="CLIPVisionModel")
    text, text_params = hub.load(pair.folder, architecture="CLIPTextModelWithProjection")
    assert (vision.config, text.config) == (pair.model.config.image, pair.model.config.text)
    assert text.projection_dim == pair.model.config.projection_dim
    whole = table.flatten(pair.params)
    for params, count in ((vision_params, 23), (text_params, 21)):
        flat = table.flatten(params)
        assert len(flat) == count
        assert all(np.array_equal(leaf, whole[path]) for path, leaf in flat.items())
