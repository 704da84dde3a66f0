"""BLIP as a recipe names it: a folder it starts from, parts that are read again alone, what does not fit, its plan."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.capfilt.models import blip
from tests.training import tiny
from vlmjax import config, hub
from vlmjax.config import BLIP_SHARDING
from vlmjax.errors import RecipeError, UserError
from vlmjax.evals.writing import Writer
from vlmjax.planning.subject import vocabulary, without_missing_parts
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import shardings
from vlmjax.training import build
from vlmjax.training.compile import init_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("blip"))


def recipe(**changes):
    changes = {"stage": "blip", "sharding": BLIP_SHARDING, "loss__lm_smoothing": 0.1} | changes
    return tiny.recipe(**changes)


def started(folder, **changes):
    """The model of a recipe that starts from the folder, and how to read its parameters."""
    made = recipe(init_from=str(folder), **changes)
    tokenizer, _ = hub.load_processor(folder)
    model = build.make_model(made, tokenizer)
    places = shardings(
        made.sharding,
        jax.eval_shape(lambda: init_params(model, 0)),
        make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )

    def read(only=None):
        return build.import_params(made, model, places, lambda: init_params(model, 0), only)

    return model, read


def flat(tree):
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree), sep="/")


def test_a_run_starts_from_a_folder_and_reads_a_part_again(folder):
    _, theirs = hub.load(folder)
    _, read = started(folder, model__image__image_size=16)
    whole, theirs = flat(read()), flat(theirs)
    assert whole.keys() == theirs.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    part = flat(read(lambda path: path.startswith("vision_model/")))
    assert part.keys() == {path for path in whole if path.startswith("vision_model/")}
    for path, value in part.items():
        np.testing.assert_array_equal(value, whole[path])


def test_positions_follow_the_image_size(folder):
    model, read = started(folder, model__image__image_size=24)
    assert model.config.image.image_shape == (24, 24)
    assert flat(read())["vision_model/embeddings/position_embedding"].shape == (10, 16)


def test_texts_that_are_longer_than_the_positions(folder):
    assert started(folder, model__text__max_length=24)[0].config.text.max_length == 24
    with pytest.raises(
        RecipeError, match="config.model.text.max_length=25: the model of config.init_from has 24"
    ):
        started(folder, model__text__max_length=25)
    tokenizer, _ = hub.load_processor(folder)
    words = build.make_model(
        recipe(model__text__positions=100, model__text__max_length=9), tokenizer
    ).config.text
    assert words.max_length == 100


def test_the_decoder_begins_with_berts_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    theirs = transformers.BertForPreTraining(transformers.BertConfig(vocab_size=60, **size))
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_()
    theirs.save_pretrained(tmp_path)
    tokenizer, _ = hub.load_processor(blip(tmp_path / "blip"))
    made = recipe(model__text_from=str(tmp_path), model__text__max_length=16)
    model = build.make_model(made, tokenizer)
    places = shardings(
        made.sharding,
        jax.eval_shape(lambda: init_params(model, 0)),
        make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )
    found = flat(build.import_params(made, model, places, lambda: init_params(model, 0)))
    dense = theirs.cls.predictions.transform.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(found["text_model/head/dense/kernel"], dense)


def test_a_caption_longer_than_the_positions_is_refused(folder):
    model, params = hub.load(folder)
    _, transform = hub.load_processor(folder)
    writer = Writer(model, transform, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    with pytest.raises(UserError, match="5 tokens and 40 new ones are more than the model's 24 positions"):
        writer(
            params, [np.arange(5, dtype=np.int32)], 8, np.zeros((1, 16, 16, 3), np.uint8), 1,
            max_new_tokens=40, ends=(1,), pad=0,
        )  # fmt: skip


def test_a_plan_needs_none_of_the_folders(folder):
    """Those that are not here are left out, and the tokens that BLIP adds stand at the end."""
    missing = recipe(init_from="runs/not-yet/hf", model__text__vocab_size=50)
    there, told = without_missing_parts(missing)
    assert told.endswith("without runs/not-yet/hf") and not there.init_from
    words = vocabulary(there)
    assert [words.token_id(token) for token in ("[DEC]", "[ENC]", "<image>")] == [48, 49, None]
    assert build.make_model(there, words).config.bos_token_id == 48
    own = recipe(init_from=str(folder), model__image__image_size=16)
    config_of = hub.load_model(folder).config
    assert without_missing_parts(own)[1] == ""
    assert vocabulary(own).token_id("[DEC]") == config_of.bos_token_id
    assert vocabulary(recipe(data__tokenizer="bpe:600")).vocab_size == 602


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss__itm_negatives": "gloabl"}, "config.loss.itm_negatives='gloabl'"),
        ({"loss__lm_smoothing": 3.0}, "config.loss.lm_smoothing=3.0"),
        ({"loss__lm": -1.0}, "config.loss.lm=-1.0"),
        ({"loss__prompt_tokens": -4}, "config.loss.prompt_tokens=-4"),
        ({"loss__kind": "sigmoid"}, "stage 'blip' has the plain softmax"),
        ({"loss__hard_negatives": 0.5}, "stage 'blip' has the plain softmax"),
        ({"data__clean": "lower"}, "clean='lower' is neither"),
    ],
)
def test_mistakes_are_found_at_once(changes, told):
    with pytest.raises(RecipeError, match=told):
        config.validate(recipe(**changes))


@pytest.mark.parametrize("stage", ["blip_vqa", "blip_nlvr"])
def test_a_single_task_begins_with_pretraining_and_goes_on_from_its_own(folder, tmp_path, stage):
    _, theirs = hub.load(folder)
    theirs, (model, read) = flat(theirs), started(folder, stage=stage, model__image__image_size=24)
    made = flat(read())
    fresh = flat(jax.jit(lambda: init_params(model, 0))())
    own = "attention" if stage == "blip_nlvr" else "decoder_attention"
    branch = "self0" if stage == "blip_nlvr" else "self"
    part = "text_encoder/averaging" if stage == "blip_nlvr" else "text_decoder/encoder/layer"
    np.testing.assert_array_equal(
        made[f"{part}/crossattention/{branch}/query/kernel"],
        theirs["text_model/encoder/layer/crossattention/self/query/kernel"][
            : len(made[f"{part}/{own}/self/query/kernel"])
        ],
    )
    assert made["vision_model/embeddings/position_embedding"].shape == (10, 16)
    new = {path for path, value in made.items() if np.array_equal(value, fresh[path])}
    assert new == {path for path in made if path.startswith("cls_") or "merge_layer" in path}
    if stage == "blip_nlvr":
        return
    hub.save(model, read(), tmp_path / "vqa", tokenizer=hub.load_processor(folder)[0])
    again, read_again = started(tmp_path / "vqa", stage=stage, model__image__image_size=24)
    assert type(again) is type(model)
    for path, value in flat(read_again()).items():
        np.testing.assert_array_equal(value, made[path])
