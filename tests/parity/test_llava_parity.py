"""LLaVA against transformers: logits, loss, gradients, padding, several images, towers, names of every generation."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import torch
import transformers
from compare import close, compiled
from safetensors.numpy import load_file, save_file

from vlmjax import decode, hub
from vlmjax.errors import HubError, UserError
from vlmjax.hub import llava
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.vlm import Vlm, deal

TOLERANCE = 2e-5
IMAGE, VOCAB = 5, 61
CLIP = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "projection_dim": 10,
}  # fmt: skip
SIGLIP = CLIP | {"image_size": 42}
del SIGLIP["projection_dim"]
WORDS = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES = {
    "clip and llama": (transformers.CLIPVisionConfig(**CLIP), transformers.LlamaConfig(**WORDS, head_dim=12), {}),
    "two layers, class token, no bias": (
        transformers.CLIPVisionConfig(**CLIP), transformers.MistralConfig(**WORDS, sliding_window=None),
        {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    ),
    "siglip and a tied qwen2": (
        transformers.SiglipVisionConfig(**SIGLIP),
        transformers.Qwen2Config(**WORDS | {"num_key_value_heads": 1}, tie_word_embeddings=True),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "tie_word_embeddings": True},
    ),
    "two matrices without activation": (
        transformers.CLIPVisionConfig(**CLIP), transformers.LlamaConfig(**WORDS), {"projector_hidden_act": "linear"},
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", list(CASES))


@functools.cache
def reference_of(name):
    vision, words, more = CASES[name]
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=words, image_token_index=IMAGE, image_seq_length=4, **more
    )
    config._attn_implementation = "eager"
    return tiny.redraw(transformers.LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function from a case to our model, its parameters and the folder that transformers wrote."""

    @functools.cache
    def loaded(name):
        folder = tiny.folder_of(reference_of(name), tmp_path_factory.mktemp("llava"))
        return *hub.load(folder), folder

    return loaded


def batch(config, side):
    """A row with two images, one without, one with one, of different lengths; images as both sides want them."""
    rng = np.random.default_rng(1)
    words = [rng.integers(10, VOCAB, n).tolist() for n in (3, 2, 4, 7, 5)]
    image = [IMAGE] * config.image_tokens
    rows = [words[0] + image + words[1] + image + words[2], words[3], image + words[4]]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    ids = np.array([row + pad if side == "right" else pad + row for row, pad in pairs], np.int32)
    mask = np.array([[1] * len(r) + p if side == "right" else p + [1] * len(r) for r, p in pairs], np.int32)
    pixels = rng.normal(size=(3, *config.image.image_shape, 3)).astype(np.float32)
    theirs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": deal(config, ids, pixels)}, theirs


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(name, side, load):
    model, params, _ = load(name)
    ours, theirs = batch(model.config, side)
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(theirs)).logits.numpy()
    found = compiled(lambda p, inputs: model.apply({"params": p}, **inputs, method="causal_lm"))(params, ours)
    real = ours["attention_mask"] == 1
    close(np.asarray(found)[real], expected[real], TOLERANCE)


@EVERY
def test_loss_and_gradients_of_the_bridge_and_below(name, load):
    """Through the language model and the placeholders into the projection and the tower's own patches."""
    model, params, _ = load(name)
    ours, theirs = batch(model.config, "right")
    labels = np.where((ours["attention_mask"] == 1) & (ours["input_ids"] != IMAGE), ours["input_ids"], -100)
    reference = reference_of(name)
    reference.zero_grad()
    expected = reference(**tiny.to_torch(theirs | {"labels": labels})).loss
    expected.backward()
    counted = labels[:, 1:] >= 0

    def loss(params):
        scores = model.apply({"params": params}, **ours, method="causal_lm")[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.maximum(labels[:, 1:], 0)[..., None], 2)
        return -jnp.where(counted, chosen[..., 0], 0.0).sum() / float(counted.sum())

    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, expected, TOLERANCE)
    theirs = dict(reference.named_parameters())
    for layer in ("linear_1", "linear_2"):
        wanted = theirs[f"model.multi_modal_projector.{layer}.weight"].grad.numpy().T
        assert np.abs(wanted).max() > 1e-4
        close(grads["bridge"][layer]["kernel"], wanted, TOLERANCE)
    patches = next(p for n, p in theirs.items() if n.endswith("patch_embedding.weight")).grad.numpy()
    close(
        grads["vision_model"]["embeddings"]["patch_embedding"]["kernel"],
        patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0]),
        TOLERANCE,
    )
    table = theirs["model.language_model.embed_tokens.weight"].grad.numpy()
    close(grads["language_model"]["token_embedding"], table, TOLERANCE)


@EVERY
def test_written_read_and_written_again_is_the_same(name, load, tmp_path):
    model, params, _ = load(name)
    hub.save(model, params, tmp_path / "one")
    again, same = hub.load(tmp_path / "one")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    hub.save(again, same, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    ours, theirs = batch(model.config, "right")
    read = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "one", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(theirs)).logits
        assert torch.equal(read(**tiny.to_torch(theirs)).logits, expected)


@EVERY
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(name, beams, load):
    """Rows of different lengths, padded on the left, one of them without an image."""
    model, params, _ = load(name)
    ours, theirs = batch(model.config, "left")
    options = {"max_new_tokens": 7, "num_beams": beams, "eos_token_id": 2, "pad_token_id": 0}
    expected = reference_of(name).generate(**tiny.to_torch(theirs), **options, do_sample=False).numpy()
    expected = expected[:, ours["input_ids"].shape[1] :]
    found = np.asarray(decode.generate(model, params, **ours, **options))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3  # they do depend on what was asked


def renamed(name, generation):
    """A tensor's name as the version before 4.52, that one, or the fifth in memory has it."""
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if generation == "first":
        return name
    name = name.replace("language_model.lm_head", "lm_head").replace(
        "language_model.model.", "model.language_model."
    )
    name = name if name.startswith(("lm_head", "model.")) else f"model.{name}"
    return name if generation == "second" else name.replace("vision_model.", "")


@pytest.mark.parametrize("generation", ["first", "second", "third"])
def test_names_of_every_generation(generation, load, tmp_path):
    _, params, folder = load("clip and llama")
    tensors = {
        renamed(name, generation): value for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    _, found = hub.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def single(load):
    """A model with one projection, as in the first LLaVA."""
    import dataclasses

    model, params, _ = load("clip and llama")
    model = Vlm(dataclasses.replace(model.config, bridge=BridgeConfig("linear", 1)))
    return model, {**params, "bridge": {"linear_1": params["bridge"]["linear_1"]}}


def test_a_single_matrix_is_written_as_two_exactly(load, tmp_path):
    model, params = single(load)
    hub.save(model, params, tmp_path)
    again, same = hub.load(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    ours, theirs = batch(model.config, "left")
    read = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = read(**tiny.to_torch(theirs)).logits.numpy()
    found = compiled(lambda p, inputs: model.apply({"params": p}, **inputs, method="causal_lm"))(params, ours)
    real = ours["attention_mask"] == 1
    close(np.asarray(found)[real], expected[real], TOLERANCE)
    # Trained on elsewhere, the second matrix is no identity any more, and that must not be lost.
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["multi_modal_projector.linear_2.weight"][0, 1] = 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HubError, match=r"linear_2\.weight is not what config\.json says .*vlmjax_bridge"):
        hub.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[llava.LINEAR_KEY]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hub.load(tmp_path)[0].config.bridge.projections == 2


def test_what_the_class_cannot_be(load, tmp_path):
    import dataclasses

    model, params, _ = load("clip and llama")
    deep = Vlm(dataclasses.replace(model.config, bridge=BridgeConfig("mlp", 3)))
    with pytest.raises(HubError, match="one hidden projection; the bridge is 'mlp' of 3"):
        hub.save(deep, params, tmp_path)
    for change, message in (
        ({"vision_config": {"model_type": "vit"}}, "vision_config.model_type is 'vit'"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type is 'gemma'"),
        ({"vision_feature_layer": 9}, "feature_layers has 9; the tower has 4 hidden states"),
        ({"vision_feature_select_strategy": "half"}, "select_strategy is 'half'; supported: default, full"),
    ):
        config = json.loads((load("clip and llama")[2] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(HubError, match=message):
            hub.load_model(tmp_path)


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "hf_models.py"


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden models on this machine")
@pytest.mark.parametrize("name", ["llava", "llava_multilayer", "llava_tied_qwen", "llava_v1_linear"])
def test_golden_models(name, tmp_path):
    """Models and inputs that somebody else chose: logits, loss, greedy tokens."""
    spec = importlib.util.spec_from_file_location("hf_models", GOLDEN)
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    reference, theirs = getattr(golden, f"build_{name}")()
    model, params = hub.load(tiny.folder_of(reference, tmp_path))
    inputs = {key: value.numpy() for key, value in theirs.items()}
    ids = inputs["input_ids"].astype(np.int32)
    pixels = deal(model.config, ids, inputs["pixel_values"].transpose(0, 2, 3, 1))
    ours = {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"].astype(np.int32),
        "pixel_values": pixels,
    }
    with torch.no_grad():
        expected = reference(**theirs).logits.numpy()
    found = compiled(lambda p, inputs: model.apply({"params": p}, **inputs, method="causal_lm"))(params, ours)
    real = ours["attention_mask"] == 1
    close(np.asarray(found)[real], expected[real], TOLERANCE)
    # Padded on the right transformers goes on from the padding: only whole rows are asked.
    whole = [row for row in range(len(ids)) if real[row].all()]
    one = {
        "input_ids": ids[whole],
        "attention_mask": ours["attention_mask"][whole],
        "pixel_values": pixels[whole],
    }
    images = [
        row[: (i == model.config.image_token_id).sum() // model.config.image_tokens]
        for row, i in zip(pixels[whole], ids[whole], strict=True)
    ]
    asked = {
        "input_ids": torch.from_numpy(ids[whole].astype(np.int64)),
        "attention_mask": torch.from_numpy(one["attention_mask"].astype(np.int64)),
        "pixel_values": torch.from_numpy(np.concatenate(images).transpose(0, 3, 1, 2).copy()),
    }
    options = {"max_new_tokens": 5, "eos_token_id": 2, "pad_token_id": 0}
    wanted = reference.generate(**asked, **options, do_sample=False).numpy()[:, ids.shape[1] :]
    new = np.asarray(decode.generate(model, params, **one, **options))
    assert len(whole) and (new[:, : wanted.shape[1]] == wanted).all()


def test_a_prompt_without_its_images_is_refused_before_compilation(load):
    model, params, _ = load("clip and llama")
    ours, _ = batch(model.config, "left")
    for change, message in (
        ({"input_ids": None}, r"input_ids has shape \(\); give"),
        ({"pixel_values": None}, r"row 0 has 8 image placeholders \(id 5\) and at most 0 image"),
        ({"pixel_values": ours["pixel_values"][:, :1]}, r"row 0 has 8 image placeholders .* at most 1 image"),
        (
            {"pixel_values": ours["pixel_values"][0]},
            r"pixel_values has shape \(2, 28, 28, 3\); expected \[batch",
        ),
    ):
        inputs = {key: value for key, value in (ours | change).items() if value is not None}
        with pytest.raises(UserError, match=message):
            decode.generate(model, params, **inputs, max_new_tokens=3)


def test_another_number_of_images_than_placeholders(load):
    model, _, _ = load("clip and llama")
    pixels = np.zeros((2, 28, 28, 3), np.float32)
    for ids in ([[IMAGE] * 4 + [9]], [[IMAGE] * 7 + [9]], [[IMAGE] * 4, [IMAGE] * 8]):
        with pytest.raises(UserError, match=r"of 4 tokens, but there are 2 image\(s\): give one <image>"):
            deal(model.config, np.array([row + [0] * (9 - len(row)) for row in ids]), pixels)
