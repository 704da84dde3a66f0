"""From a recipe to the objects of a run."""

import dataclasses
import json
import math

import pytest
from training import tiny

from vlmjax import config
from vlmjax.data import bpe
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, CheckpointError, RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.clip import Clip
from vlmjax.models.text import TextConfig
from vlmjax.training import build
from vlmjax.training.workdir import Workdir


class Words:
    """A source of records that have captions and no picture worth reading."""

    name, fingerprint = "words", "0"

    def __init__(self, captions):
        self.captions, self.read = captions, 0

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        self.read += 1
        if self.captions[i] is None:
            raise BadRecord("truncated", str(i))
        return Record(str(i), b"", self.captions[i])


def recipe(**changes):
    return config.validate(tiny.recipe(**changes))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    bpe.train_bpe(["a red circle", "a blue square"] * 9, 530, folder)
    return build.text.load(folder, 16)


def test_a_tokenizer_is_trained_kept_and_used_again(tmp_path):
    workdir, source = Workdir(str(tmp_path)), Words([("a red circle",), None, ("blue", "a blue square")] * 5)
    made = build.make_tokenizer(recipe(data__tokenizer="bpe:530"), source, workdir)
    assert 514 < made.vocab_size <= 530 and made.max_length == 16 and source.read == 15
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file() and not (
        tmp_path / "tokenizer.partial"
    ).exists()
    workdir.write_json("recipe.json", recipe(data__tokenizer="bpe:530").to_dict())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    again = build.make_tokenizer(recipe(data__tokenizer="bpe:530"), source, workdir)
    assert again.vocab_size == made.vocab_size and source.read == 15  # from the folder


def test_a_tokenizer_left_by_a_run_that_never_began_is_learned_anew(tmp_path):
    workdir, words = Workdir(str(tmp_path)), recipe(data__tokenizer="bpe:530")
    build.make_tokenizer(words, Words([("x",)]), workdir)
    workdir.write_json("recipe.json", words.to_dict())
    assert build.make_tokenizer(words, Words([("a red circle",)] * 9), workdir).vocab_size > 514


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    (tmp_path / "recipe.json").write_text('{"stage": ')
    with pytest.raises(CheckpointError, match="recipe.json is damaged"):
        build.make_tokenizer(recipe(), Words([("a",)]), Workdir(str(tmp_path)))


def test_a_tokenizer_left_by_another_recipe_is_replaced(tmp_path):
    workdir, source = Workdir(str(tmp_path)), Words([("a red circle",)] * 20)
    build.make_tokenizer(recipe(data__tokenizer="bpe:520"), source, workdir)
    workdir.write_json("recipe.json", recipe(data__tokenizer="bpe:520").to_dict())
    other = build.make_tokenizer(recipe(data__tokenizer="bpe:514"), source, workdir)
    assert other.vocab_size == 514


def test_the_tokenizer_of_a_run_with_a_checkpoint_is_never_replaced(tmp_path):
    workdir, source = Workdir(str(tmp_path)), Words([("a red circle",)] * 20)
    build.make_tokenizer(recipe(data__tokenizer="bpe:520"), source, workdir)
    workdir.write_json("recipe.json", recipe(data__tokenizer="bpe:520").to_dict())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    before = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    with pytest.raises(RecipeError, match="holds a run with tokenizer 'bpe:520', this recipe has 'bpe:514'"):
        build.make_tokenizer(recipe(data__tokenizer="bpe:514"), source, workdir)
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_whose_texts_end_elsewhere_is_refused(tokenizer):
    words = build.clip_config(recipe(data__tokenizer="bpe:530"), tokenizer).text
    with pytest.raises(RecipeError, match=r"ends a text with id \d+, the text tower reads it at id 7"):
        build._check_end(dataclasses.replace(words, eos_token_id=7), tokenizer, "bpe:530")
    build._check_end(
        dataclasses.replace(words, eos_token_id=2), tokenizer, "bpe:530"
    )  # the largest id of a text
    build._check_end(BertConfig(8, 1, 2, 16, vocab_size=600, max_length=8), tokenizer, "bpe:530")


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:513"])
def test_sizes_that_make_no_tokenizer(tmp_path, name):
    with pytest.raises(RecipeError, match="expected 'bpe:' and a number from 514"):
        build.make_tokenizer(recipe(data__tokenizer=name), Words([("a",)]), Workdir(str(tmp_path)))


def test_what_cannot_be_opened_names_its_key(tmp_path):
    with pytest.raises(RecipeError, match="config.data.tokenizer: "):
        build.make_tokenizer(recipe(data__tokenizer=f"{tmp_path}/t"), Words([("a",)]), Workdir(str(tmp_path)))


def test_evaluation_sees_images_as_the_recipe_says():
    made = build.eval_transform(recipe(data__background=(1, 2, 3), data__mean=(0.1, 0.2, 0.3)), (16, 24))
    assert (made.size, made.crop, made.background, made.mean) == (16, (16, 24), (1, 2, 3), (0.1, 0.2, 0.3))


def test_a_clip_of_a_recipe(tokenizer):
    found = build.clip_config(recipe(loss__logit_scale_init=20.0, model__remat="dots"), tokenizer)
    assert (found.image.width, found.image.image_shape, found.image.remat) == (16, (16, 16), "dots")
    assert isinstance(found.text, TextConfig) and found.text.vocab_size == tokenizer.vocab_size
    assert found.text.eos_token_id == tokenizer.eos_token_id == tokenizer.vocab_size - 1
    assert found.logit_scale_init == pytest.approx(math.log(20.0)) and found.image.dtype == "float32"
    larger = build.clip_config(recipe(model__text__vocab_size=1000, model__dtype="bfloat16"), tokenizer)
    assert larger.text.vocab_size == 1000 and larger.text.dtype == "bfloat16"


def test_a_dual_encoder_of_a_recipe(tokenizer):
    found = build.clip_config(recipe(model__text__kind="bert", model__text__dropout=0.2), tokenizer)
    assert isinstance(found.text, BertConfig) and found.text.dropout == 0.2
    assert found.text.pad_token_id == tokenizer.pad_token_id


def test_models_that_make_no_sense(tokenizer):
    with pytest.raises(RecipeError, match="CLIP's text tower has none"):
        build.clip_config(recipe(model__text__dropout=0.1), tokenizer)
    with pytest.raises(RecipeError, match="the text tower embeds 100: set config.model.text.vocab_size"):
        build.clip_config(recipe(model__text__vocab_size=100), tokenizer)


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_model_as_json_and_back(tokenizer, kind):
    made = build.clip_config(recipe(model__text__kind=kind), tokenizer)
    again = build.model_from_json(json.loads(json.dumps(build.model_to_json(Clip(made))))).config
    assert again == made
    wide = build.dataclasses.replace(made, image=build.dataclasses.replace(made.image, image_size=(16, 24)))
    assert build.model_from_json(json.loads(json.dumps(build.model_to_json(Clip(wide))))).config == wide
