"""Tokenizer and image processor of a folder: read, written for transformers, and refused where they do not fit."""

import dataclasses
import json

import jax
import models
import numpy as np
import pytest

from vlmjax import hub
from vlmjax.data import bpe, text
from vlmjax.data.images import EvalTransform
from vlmjax.errors import HubError
from vlmjax.hub import folder as hub_folder
from vlmjax.models.clip import Clip, ClipConfig, ClipText
from vlmjax.models.decoder import Decoder

CAPTIONS = [
    "a red circle above a blue square",
    "two small green triangles",
    "a large yellow star",
    "nothing at all",
]
IMAGES = EvalTransform(24, (24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.train_bpe(CAPTIONS * 20, 560, str(folder))
    return text.load(folder, models.TEXT.max_length)


@pytest.fixture(scope="module")
def clip(tokenizer):
    """The tiny CLIP with the ids of this tokenizer."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    words = dataclasses.replace(models.TEXT, vocab_size=tokenizer.vocab_size, **ids)
    model = Clip(ClipConfig(models.IMAGE, words, 10))
    table = np.zeros((tokenizer.vocab_size, words.width), np.float32)
    params = dict(models.params_of("CLIPModel"))
    params["text_model"] = params["text_model"] | {
        "embeddings": params["text_model"]["embeddings"] | {"token_embedding": table}
    }
    return model, params


@pytest.fixture(scope="module")
def folder(clip, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    hub.save(*clip, path, tokenizer=tokenizer, image_processor=IMAGES)
    return path


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (33, 47, 3)).astype(np.uint8)


def test_it_comes_back(folder, tokenizer):
    words, transform = hub.load_processor(folder)
    assert transform == IMAGES
    assert words.max_length == 16
    for name in ("input_ids", "attention_mask"):
        assert np.array_equal(words(CAPTIONS)[name], tokenizer(CAPTIONS)[name])


def test_saving_again_from_the_folder_gives_the_same_files(clip, folder, tmp_path):
    words, transform = hub.load_processor(folder)
    hub.save(*clip, tmp_path / "loaded", tokenizer=words, image_processor=transform)
    hub.save(*clip, tmp_path / "named", tokenizer=folder, image_processor=folder)
    for other in ("loaded", "named"):
        for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / other / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("loader", ["CLIPProcessor", "AutoProcessor"])
def test_transformers_processor_loads_it_and_agrees(loader, folder, tokenizer, picture):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, loader).from_pretrained(folder)
    assert type(processor).__name__ == "CLIPProcessor"
    out = processor(
        text=CAPTIONS, images=[picture], padding="max_length", truncation=True, return_tensors="np"
    )
    ours = tokenizer(CAPTIONS)
    assert np.array_equal(out["input_ids"], ours["input_ids"])
    assert np.array_equal(out["attention_mask"], ours["attention_mask"])
    mine = IMAGES.normalize(IMAGES(picture))[None].transpose(0, 3, 1, 2)
    # One grey level of 255, over the smallest std: the most that two resize implementations may differ by.
    assert np.abs(out["pixel_values"] - mine).max() < 1.01 / 255 / 0.2


def test_a_processor_saved_by_transformers_5_is_read(folder, tmp_path):
    """It nests the image processor in processor_config.json."""
    transformers = pytest.importorskip("transformers")
    transformers.CLIPProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    _, transform = hub.load_processor(tmp_path)
    assert transform == IMAGES


def test_an_earlier_nested_processor_does_not_win(clip, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    other = dataclasses.replace(IMAGES, mean=(0.1, 0.1, 0.1))
    hub.save(*clip, tmp_path, image_processor=other)
    assert hub.load_processor(tmp_path)[1] == other
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path).image_mean[0] == 0.1


def test_image_processors_of_other_kinds(clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"shortest_edge": 24}
    crop = {"height": 24, "width": 24}
    settings = {"size": size, "crop_size": crop, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    for number, given in enumerate((settings, transformers.CLIPImageProcessor(**settings))):
        hub.save(*clip, tmp_path / str(number), image_processor=given)
        assert hub.load_processor(tmp_path / str(number)) == (None, IMAGES)


def test_dual_encoder_processor(tmp_path, picture):
    transformers = pytest.importorskip("transformers")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle blue square two small ##s".split()
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    words = text.load(tmp_path, 16)
    name = "VisionTextDualEncoderModel"
    hub.save(models.MODELS[name], models.params_of(name), tmp_path / "out", words, IMAGES)
    again, transform = hub.load_processor(tmp_path / "out")
    assert transform == IMAGES and again.max_length == 16
    ids = words(["a red circle", "two blue squares"])["input_ids"]
    assert np.array_equal(again(["a red circle", "two blue squares"])["input_ids"], ids)
    for loader in ("VisionTextDualEncoderProcessor", "AutoProcessor"):
        processor = getattr(transformers, loader).from_pretrained(tmp_path / "out")
        assert type(processor).__name__ == "VisionTextDualEncoderProcessor"
        out = processor(text=["a red circle", "two blue squares"], images=[picture], padding="max_length",
                        return_tensors="np")  # fmt: skip
        assert np.array_equal(out["input_ids"], ids) and out["pixel_values"].shape == (1, 3, 24, 24)


def test_openais_own_tokenizer_in_a_folder_of_ours(shared_path, tmp_path):
    """A bare tokenizer.json, cut at the model's length by whoever opens the folder."""
    transformers = pytest.importorskip("transformers")
    words = text.load(shared_path("data/tokenizers/clip"), 16)
    ids = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    model = ClipText(dataclasses.replace(models.TEXT, width=3, mlp_dim=3, depth=1, **ids))
    shapes = hub_folder.abstract_params(hub_folder.family_of(model), model)
    hub.save(
        model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), tmp_path, tokenizer=words
    )
    captions = [*CAPTIONS, "Ünïcode &amp; 3 emoji 🐈!", "a " * 30]
    expected = words(captions)["input_ids"]
    for cls in (transformers.AutoTokenizer, transformers.CLIPTokenizer):
        theirs = cls.from_pretrained(tmp_path)
        out = theirs(captions, padding="max_length", truncation=True, return_tensors="np")
        assert np.array_equal(out["input_ids"], expected)
    assert np.array_equal(hub.load_processor(tmp_path)[0](captions)["input_ids"], expected)


class TestRefused:
    """What would make a folder that lies about itself."""

    def test_images_of_another_size(self, clip, tmp_path):
        with pytest.raises(
            HubError, match=r"makes images of \(32, 32\), but the model takes exactly \(24, 24\)"
        ):
            hub.save(*clip, tmp_path / "out", image_processor=EvalTransform(32, (32, 32)))
        assert not (tmp_path / "out").exists()

    def test_the_tokenizer_of_another_model(self, clip, tokenizer, tmp_path):
        model, params = clip
        small = models.MODELS["CLIPModel"]
        with pytest.raises(HubError, match="another model's tokenizer"):
            hub.save(small, models.params_of("CLIPModel"), tmp_path / "out", tokenizer=tokenizer)
        words = dataclasses.replace(model.config.text, eos_token_id=5)
        other = Clip(dataclasses.replace(model.config, text=words))
        with pytest.raises(HubError, match=f"ends texts with id {tokenizer.eos_token_id}, .*eos_token_id 5"):
            hub.save(other, params, tmp_path / "out", tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()

    def test_an_input_that_the_model_does_not_have(self, tokenizer, tmp_path):
        for name, given in (
            ("CLIPVisionModel", {"tokenizer": tokenizer}),
            ("BertModel", {"image_processor": IMAGES}),
        ):
            with pytest.raises(HubError, match=f"{name} has no .*leave out"):
                hub.save(models.MODELS[name], models.params_of(name), tmp_path, **given)

    def test_things_that_are_neither(self, clip, tmp_path):
        with pytest.raises(HubError, match="tokenizer is a int"):
            hub.save(*clip, tmp_path, tokenizer=3)
        with pytest.raises(HubError, match="image_processor is a int"):
            hub.save(*clip, tmp_path, image_processor=3)
        with pytest.raises(HubError, match="holds no preprocessor_config.json"):
            hub.save(*clip, tmp_path, image_processor=tmp_path)


def test_a_folder_without_either(tmp_path):
    with pytest.raises(HubError, match="holds neither a tokenizer"):
        hub.load_processor(tmp_path)


def test_settings_that_cannot_be_followed(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    with pytest.raises(HubError, match="do_resize=false"):
        hub.load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(HubError, match="not valid JSON"):
        hub.load_processor(tmp_path)


def test_the_form_of_2021(tmp_path):
    """OpenAI's first folders have plain numbers as sizes."""
    old = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 224,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert hub.load_processor(tmp_path) == (None, EvalTransform(224, (224, 224)))


def test_a_language_model_keeps_its_tokenizer_and_refuses_a_larger_one(tokenizer, tmp_path):
    config = dataclasses.replace(models.LLAMA, vocab_size=tokenizer.vocab_size)
    model = Decoder(config)
    shapes = hub_folder.abstract_params(hub_folder.family_of(model), model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    hub.save(model, params, tmp_path, tokenizer=tokenizer)
    words, transform = hub.load_processor(tmp_path)
    assert transform is None and words.max_length == config.max_length
    assert words.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])
    with pytest.raises(HubError, match="the model 50; it is another model's tokenizer"):
        hub.save(models.MODELS["LlamaForCausalLM"], models.params_of("LlamaForCausalLM"), tmp_path, tokenizer)
    with pytest.raises(HubError, match="LlamaForCausalLM has no images"):
        hub.save(model, params, tmp_path, image_processor=IMAGES)
