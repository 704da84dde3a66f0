"""A classifier's loss, its rates, and what it begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from tests.evals.tiny_model import NAMES, write_model
from tests.hub.models import BLIP, VIT, params_of
from tests.models.tiny_models import make_params
from tests.training import tiny
from vlmjax import config, hub
from vlmjax.config import BLIP_SHARDING
from vlmjax.errors import RecipeError
from vlmjax.evals.zeroshot import build_classifier
from vlmjax.models.blip import BlipRetriever
from vlmjax.models.classifier import Classifier, ClassifierConfig
from vlmjax.models.clip import ClipVision
from vlmjax.models.vit import VitConfig
from vlmjax.ops.resize import resize_positions
from vlmjax.planning.subject import train_subject
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import shardings
from vlmjax.stages.classification import Classification
from vlmjax.training import build
from vlmjax.training.compile import init_params
from vlmjax.training.optimizer import make_optimizer
from vlmjax.training.state import make_state
from vlmjax.training.step import make_train_step

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
SHAPES = "scenes:train:single:shape"


def recipe(**changes):
    changes = {"stage": "classification", "sharding": BLIP_SHARDING, "data__train": SHAPES} | changes
    return tiny.recipe(**changes)


@pytest.fixture(scope="module")
def classes_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("".join(f"n{i}\t{name}\n" for i, name in enumerate(NAMES)))
    return str(path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "hf"
    write_model(path)
    return path


# ---- the loss


@pytest.fixture(scope="module")
def small():
    """(model, parameters, batch): of 16 rows three cannot be used."""
    model = Classifier(ClassifierConfig(VitConfig(**SIZES, image_size=16, patch_size=8), ("a", "b", "c")))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 16, 3), np.uint8)
    params = make_params(model, np.zeros((1, 16, 16, 3), np.float32))
    valid = np.ones(16, bool)
    valid[[2, 3, 11]] = False
    labels = np.where(valid, rng.integers(0, 3, 16), 0).astype(np.int32)
    return model, params, {"pixel_values": pixels, "valid": valid, "label": labels}


def updated(small, micro_batches=1, devices=1):
    """(parameters after a step of plain descent at rate 1, metrics)."""
    model, params, batch = small
    mesh = make_mesh(devices=jax.devices()[:devices])
    stage = Classification(recipe(loss__label_smoothing=0.2), model, mesh)
    optimizer = optax.sgd(1.0)
    step = make_train_step(stage, optimizer, lambda _: 1.0, mesh, seed=0, micro_batches=micro_batches)
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = jax.jit(step)(make_state(params, (), optimizer, False), batch)
    return traverse_util.flatten_dict(jax.device_get(state.params), sep="/"), jax.device_get(metrics)


@pytest.mark.slow
def test_the_loss_is_the_definition_over_rows_that_can_be_used(small):
    model, params, batch = small
    c = recipe()
    pixels = (batch["pixel_values"] / np.float32(255) - np.float32(c.data.mean)) / np.float32(c.data.std)
    scores = np.asarray(model.apply({"params": params}, pixels.astype(np.float32)), np.float64)
    chances = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    losses = [
        -0.8 * row[label] - 0.2 * row.mean()
        for row, label, valid in zip(chances, batch["label"], batch["valid"], strict=True)
        if valid
    ]
    _, metrics = updated(small)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    right = (scores.argmax(axis=1) == batch["label"])[batch["valid"]]
    assert metrics["accuracy"] == pytest.approx(right.mean())


@pytest.mark.slow
def test_micro_batches_and_devices_change_nothing(small):
    wanted, metrics = updated(small)
    for options in ({"micro_batches": 4}, {"micro_batches": 2, "devices": 4}):
        found, other = updated(small, **options)
        assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
        assert other["accuracy"] == pytest.approx(metrics["accuracy"])
        for path, value in wanted.items():
            np.testing.assert_allclose(found[path], value, atol=1e-6, err_msg=path)


def test_the_rate_of_a_layer_falls_towards_the_pixels(small):
    """After a step of Adam's kind every parameter has moved by its own rate."""
    _, params, _ = small
    settings = recipe(
        optimizer__layer_decay=0.5, optimizer__name="lion", optimizer__weight_decay=0.0
    ).optimizer
    optimizer = make_optimizer(settings, optax.constant_schedule(1.0), params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    moved = traverse_util.flatten_dict(jax.tree.map(lambda x: -np.asarray(x), updates), sep="/")
    for path, rate in moved.items():
        if path.startswith("vision_model/encoder/layers/"):
            np.testing.assert_allclose(
                rate, np.stack([np.full(rate.shape[1:], r) for r in (0.25, 0.5)]), rtol=1e-6
            )
        else:
            below = path.startswith(("vision_model/embeddings/", "vision_model/pre_layernorm/"))
            np.testing.assert_allclose(
                rate, np.full(rate.shape, 0.125 if below else 1.0), rtol=1e-6, err_msg=path
            )


# ---- what it begins with


def started(**changes):
    """(recipe's model, its parameters, a function that reads some of them again)."""
    made = config.validate(recipe(**changes))
    model = build.make_model(made, None)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    places = shardings(made.sharding, jax.eval_shape(lambda: init_params(model, 0)), mesh)

    def read(only=None):
        found = build.import_params(made, model, places, lambda: init_params(model, 0), only)
        return traverse_util.flatten_dict(jax.tree.map(np.asarray, found), sep="/")

    return model, read(), read


@pytest.mark.parametrize("kind", ["clip", "vision", "vit", "blip"])
def test_every_folder_gives_its_tower(kind, clip_folder, classes_file, tmp_path):
    """At another image size, whose positions are resampled; the head is new, and the same for every folder."""
    folder, size = tmp_path / "hf", 24
    if kind == "clip":
        folder = clip_folder
    else:
        models = {
            "vision": ClipVision(VitConfig(**SIZES, image_size=16, patch_size=8)),
            "vit": ClipVision(VIT),
            "blip": BlipRetriever(BLIP),
        }
        model, size = models[kind], 32
        name = "BlipForImageTextRetrieval" if kind == "blip" else "ViTModel"
        pixels = np.zeros((1, *getattr(model.config, "image", model.config).image_shape, 3), np.float32)
        hub.save(model, make_params(model, pixels) if kind == "vision" else params_of(name), folder)
    _, theirs = hub.load(folder)
    theirs = traverse_util.flatten_dict({"vision_model": theirs["vision_model"]}, sep="/")
    options = {"init_from": str(folder), "data__classes": classes_file, "model__image__image_size": size}
    model, params, read = started(**options)
    table = "vision_model/embeddings/position_embedding"
    old = hub.load_model(folder).config
    old = getattr(old, "image", old)
    assert model.config.image.grid != old.grid
    theirs[table] = resize_positions(jnp.asarray(theirs[table]), old.grid, model.config.image.grid)
    assert set(params) == set(theirs) | {"classifier/kernel", "classifier/bias"}
    for path, value in theirs.items():
        np.testing.assert_allclose(params[path], value, atol=1e-6, err_msg=path)
    assert (
        params["classifier/kernel"].shape == (old.width, 4)
        and 0.01 < params["classifier/kernel"].std() < 0.03
    )
    part = read(lambda path: path.startswith("vision_model/encoder"))
    assert set(part) == {path for path in params if path.startswith("vision_model/encoder")}


@pytest.mark.slow
def test_a_head_of_prompts_scores_as_zeroshot_does(clip_folder, classes_file):
    """Temperature times cosine with the mean of the prompts' directions, written out with the model's own methods."""
    options = {"init_from": str(clip_folder), "data__classes": classes_file, "model__pool": "projected"}
    model, params, _ = started(**options, model__head_from="drawing")
    assert model.config.names == tuple(NAMES) and model.config.labels == ("n0", "n1", "n2", "n3")
    clip, theirs = hub.load(clip_folder)
    tokenizer, _ = hub.load_processor(clip_folder)
    from vlmjax.evals.templates import TEMPLATES

    texts = [[t.replace("{}", name) for t in TEMPLATES["drawing"]] for name in NAMES]
    encode = jax.jit(lambda tokens: clip.apply({"params": theirs}, **tokens, method="encode_text"))
    features = np.stack([encode(tokenizer(some)) for some in texts])
    pixels = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    image = clip.apply({"params": theirs}, pixels, method="encode_image")
    expected = np.exp(theirs["logit_scale"]) * image @ build_classifier(features).T
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params, sep="/"))
    found = model.apply({"params": params}, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_head_of_a_classifier_of_the_same_classes_is_kept(classes_file, tmp_path):
    model = Classifier(
        ClassifierConfig(VitConfig(**SIZES, image_size=16, patch_size=8), tuple(NAMES), pool="mean")
    )
    theirs = make_params(model, np.zeros((1, 16, 16, 3), np.float32))
    hub.save(model, theirs, tmp_path)
    options = {"init_from": str(tmp_path), "data__classes": classes_file}
    _, params, _ = started(**options, model__pool="mean")
    np.testing.assert_array_equal(params["classifier/kernel"], theirs["classifier"]["kernel"])
    _, params, _ = started(**options)
    assert params["classifier/kernel"].std() < 0.03  # it read something else


def test_folders_without_what_the_head_reads_are_refused(clip_folder, classes_file, tmp_path):
    hub.save(ClipVision(VIT), params_of("ViTModel"), tmp_path)
    for changes, message in (
        (
            {"init_from": str(tmp_path), "model__pool": "projected"},
            "holds a ClipVision without CLIP's projection",
        ),
        ({"model__head_from": "photo"}, "set config.model.pool='projected' and config.init_from"),
        (
            {"init_from": str(clip_folder), "model__image__image_size": 20},
            "not a multiple of the model's patch_size=8",
        ),
        ({"data__classes": str(tmp_path / "none.txt")}, "config.data.classes: classes file .*none.txt"),
        ({"model__pool": "last"}, "config.model.pool='last'"),
        ({"optimizer__layer_decay": 0.0}, "config.optimizer.layer_decay=0.0: expected"),
        (
            {"stage": "contrastive", "data__classes": "", "optimizer__layer_decay": 0.5},
            "layer_decay=0.5 is for stage='classification'",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            started(**{"data__classes": classes_file} | changes)


# ---- around it


def test_a_recipe_can_be_planned_without_its_folder(classes_file):
    made = recipe(
        init_from="no/such-folder",
        data__classes=classes_file,
        model__head_from="photo",
        model__pool="projected",
    )
    subject = train_subject(config.validate(made), jax.devices()[:1], "a plan")
    assert subject.parameters == subject.trainable > 0 and "without no/such-folder" in subject.title


def test_flops_of_a_step_count_a_frozen_tower_once(small):
    model, params, batch = small
    stage = Classification(recipe(), model, make_mesh())
    whole, head = stage.train_flops(batch, params), stage.train_flops(batch, {"classifier": 0})
    tower = (whole - head) / 2
    assert head - tower == 16 * 3 * 2 * 16 * 3
