"""What a plan is of: the recipe without its data, its tokenizer's size, the lengths that are known."""

import jax
import pytest
from planning import tpu

from vlmjax import config
from vlmjax.data import bpe
from vlmjax.errors import RecipeError
from vlmjax.planning.subject import Vocabulary, for_platform, train_subject, vocabulary
from vlmjax.training import build


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def subject(examples=None, **changes):
    return train_subject(tpu.recipe(**changes), jax.devices(), "tiny", examples)


def test_where_the_size_of_the_vocabulary_comes_from(tmp_path):
    assert vocabulary(tpu.recipe()).vocab_size == 514  # "bpe:514", not trained
    assert vocabulary(tpu.recipe(data__tokenizer="bpe:1024")).vocab_size == 1024
    assert (
        vocabulary(tpu.recipe(model__text__vocab_size=49_408, data__tokenizer="no/such")).vocab_size == 49_408
    )
    bpe.train_bpe(["a red square", "a blue disc"], 520, tmp_path)
    assert vocabulary(tpu.recipe(data__tokenizer=str(tmp_path))).vocab_size == 520
    with pytest.raises(RecipeError, match="plan with the number of its tokens"):
        vocabulary(tpu.recipe(data__tokenizer=str(tmp_path / "none")))


def test_a_vocabulary_makes_the_model_of_its_size():
    model = build.make_model(tpu.recipe(), Vocabulary(600))
    assert model.config.text.vocab_size == 600 and model.config.text.eos_token_id == 599


def test_auto_follows_the_devices_that_are_planned_for():
    recipe = tpu.recipe()
    assert for_platform(recipe, "tpu").model.dtype == "bfloat16" == for_platform(recipe, "gpu").model.dtype
    assert for_platform(recipe, "cpu").model.dtype == "float32" and recipe.model.dtype == "auto"
    assert for_platform(tpu.recipe(model__dtype="float32"), "tpu").model.dtype == "float32"


def test_lengths_that_need_the_size_of_the_data():
    epochs = {"total": config.duration(epochs=2.0), "data__train": "/nowhere/x-00.tar"}
    unknown = subject(**epochs)
    assert unknown.steps is None and "give --examples=N" in unknown.why_no_steps
    assert subject(800, **epochs).steps == 100
    assert subject(total=config.duration(steps=7), data__train="/nowhere/x-00.tar").steps == 7
    assert subject(total=config.duration(epochs=0.001)).steps > 10  # scenes can be opened
    with pytest.raises(RecipeError, match="holds 8 records, fewer than one batch"):
        subject(8, **epochs)


def test_parameters_and_frozen_ones():
    whole = subject()
    locked = subject(frozen=("vision_model/.*",))
    assert whole.parameters == whole.trainable == locked.parameters
    frozen = locked.arguments[0].frozen
    assert locked.parameters - locked.trainable == sum(x.size for x in jax.tree.leaves(frozen)) > 0
    assert locked.flops < whole.flops


def test_what_training_refuses_is_refused():
    with pytest.raises(RecipeError, match="cannot be cut evenly"):
        subject(batch_size=12)
    with pytest.raises(RecipeError, match="does not fit 8 device"):
        subject(mesh__data=3, batch_size=24)
