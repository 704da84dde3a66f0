"""Vision-language models from parts: towers and language models of other folders, vocabularies that grow, refusals."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from training import tiny

from vlmjax import config, hub
from vlmjax.data import recipe as data_recipe
from vlmjax.data import text
from vlmjax.data.conversation import MARK
from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.clip import ClipVision
from vlmjax.models.decoder import Decoder, DecoderConfig
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig, example_inputs
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import shardings
from vlmjax.training import build, compile, finish, start, vlm_parts
from vlmjax.training.compile import init_params

VIT = VitConfig(width=16, depth=2, heads=2, mlp_dim=24, image_size=16, patch_size=8)
WORDS = DecoderConfig(16, 2, 4, 2, 4, 24, vocab_size=50, max_length=64)


class Words(text.Tokenizer):
    """As much of a tokenizer as making a model asks for: a placeholder after the language model's own tokens."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, vocab_size=51):
        self.vocab_size = vocab_size

    def token_id(self, token):
        """The placeholder is the last token."""
        return self.vocab_size - 1 if token == MARK else None


def saved(model, folder, inputs):
    params = jax.jit(lambda: model.init(jax.random.key(4), **inputs)["params"])()
    params = jax.tree.map(np.asarray, params)
    hub.save(model, params, folder)
    return params


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tower and a language model, and their parameters."""
    folder = tmp_path_factory.mktemp("parts")
    pixels = {"pixel_values": np.zeros((1, 16, 16, 3), np.float32)}
    ids = {"method": "causal_lm", "input_ids": np.zeros((1, 1), np.int32)}
    return (
        folder,
        saved(ClipVision(VIT), folder / "tower", pixels),
        saved(Decoder(WORDS), folder / "words", ids),
    )


def recipe(folder, **changes):
    c = tiny.recipe(
        stage="generative",
        model__image_from=str(folder / "tower"),
        model__language_from=str(folder / "words"),
        data__max_length=40,
        **changes,
    )
    c.sharding = config.VLM_SHARDING
    c.frozen = ("vision_model/.*", "language_model/.*")
    return c


def test_parts_are_imported_and_new_tokens_begin_as_the_mean(parts):
    folder, tower, words = parts
    c, mesh = recipe(folder), make_mesh(data=2, fsdp=4)
    model = build.make_model(c, Words())
    assert model.config.text.vocab_size == 64 and model.config.image_token_id == 50

    def fresh():
        return init_params(model, 0)

    places = shardings(c.sharding, jax.eval_shape(fresh), mesh)
    params = build.import_params(c, model, places, fresh)
    jax.tree.map(np.testing.assert_array_equal, params["vision_model"], tower["vision_model"])
    for name in ("token_embedding", "lm_head"):
        table = np.asarray(params["language_model"][name])
        np.testing.assert_array_equal(table[:50], words[name])
        mean = words[name].astype(np.float64).mean(axis=0).astype(np.float32)
        np.testing.assert_array_equal(table[50:], np.broadcast_to(mean, (14, 16)))
        assert params["language_model"][name].sharding == places["language_model"][name]
    layers = params["language_model"]["layers"]
    jax.tree.map(np.testing.assert_array_equal, layers, words["layers"])
    jax.tree.map(np.testing.assert_array_equal, params["bridge"], fresh()["bridge"])
    assert vlm_parts.from_json(json.loads(json.dumps(vlm_parts.to_json(model.config)))).config == model.config


@pytest.mark.parametrize(
    "frozen", ["vision_model/.*", "language_model/layers/.*", "language_model/token_embedding"]
)
def test_what_is_frozen_is_read_again_without_the_rest(parts, frozen):
    """What a checkpoint only names, whichever part or piece of a part it is, and nothing beside it."""
    folder, tower, words = parts
    c, mesh = recipe(folder), make_mesh(data=2, fsdp=4)
    c.frozen = (frozen,)
    model = build.make_model(c, Words())
    program = compile.make_program(c, model, mesh, optax.constant_schedule(0.1))
    again = start.reference(c, model, program, mesh).fetch()
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), again) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), program.state.frozen
    )
    found = traverse_util.flatten_dict(again, sep="/")
    for path, value in traverse_util.flatten_dict({**tower, "language_model": words}, sep="/").items():
        if path in found:
            np.testing.assert_array_equal(found[path][: len(value)], value)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"data__max_length": 65}, {}, r"max_length=65: the language model has 64 positions"),
        ({"model__image__image_size": 32}, {}, r"takes images of 16 pixels .* the recipe says 32"),
        ({"model__image_from": "words"}, {}, r"config\.model\.image_from: .*'llama' has no image tower"),
        ({"model__language_from": "tower"}, {}, r"language_from=.* holds a ClipVision; a causal"),
        ({"model__language_from": "nowhere"}, {}, r"config\.model\.language_from: .*nowhere: no such folder"),
        ({"init_from": "tower"}, {}, r"init_from=.* holds a ClipVision; stage 'generative' needs a whole"),
    ],
)
def test_parts_that_do_not_fit(parts, changes, words, message):
    folder = parts[0]
    for key in ("model__image_from", "model__language_from", "init_from"):
        if key in changes:
            changes = changes | {key: str(folder / changes[key])}
    c = recipe(folder)
    for path, value in changes.items():
        tiny.put(c, path.replace("__", "."), value)
    with pytest.raises(RecipeError, match=message):
        build.make_model(c, Words(**words))


def test_a_whole_model_keeps_its_image_size_and_its_tokens(parts, tmp_path):
    whole = Vlm(VlmConfig(VIT, dataclasses.replace(WORDS, vocab_size=64), BridgeConfig(), 50))
    saved(whole, tmp_path, example_inputs(whole.config))
    c = recipe(parts[0], init_from=str(tmp_path))
    assert build.make_model(c, Words()).config.image_token_id == 50
    with pytest.raises(
        RecipeError, match=r"has 60 tokens and <image> as id 59, the model embeds 64 and expects 50"
    ):
        build.make_model(c, Words(60))
    c.model.image.image_size = 24
    with pytest.raises(RecipeError, match=r"image_size=24: the model of config\.init_from=.* has 16"):
        build.make_model(c, Words())


def test_what_cannot_be_exported_is_said_before_training(parts):
    c = recipe(parts[0], model__bridge__depth=3)
    with pytest.raises(RecipeError, match=r"config\.export=True: .*3 projections; set config\.export=False"):
        finish.check_export(build.make_model(c, Words()))
    finish.check_export(build.make_model(recipe(parts[0]), Words()))


def test_recipes_of_runs_from_before_there_were_language_models():
    old = config.recipe()
    del old.model["language_from"]
    old.data.tokenizer = "bpe:1024"
    assert data_recipe.tokenizer_name(old) == "bpe:1024"


def test_a_bridge_with_a_qformer_comes_back_from_json(parts):
    qformer = QformerConfig(BertConfig(24, 3, 2, 40, vocab_size=9, type_vocab_size=None), 4, 2, False)
    config = build.make_model(recipe(parts[0]), Words()).config
    config = dataclasses.replace(config, bridge=BridgeConfig("qformer", qformer=qformer))
    assert vlm_parts.from_json(json.loads(json.dumps(vlm_parts.to_json(config)))).config == config
