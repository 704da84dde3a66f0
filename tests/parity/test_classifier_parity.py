"""Classifiers: CLIPForImageClassification's and ViTForImageClassification's scores, gradients and folders."""

import copy
import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import torch
import transformers
from compare import close, compiled, forward, run_exported
from test_blip_start import VIT

from tests.hub.models import same
from tests.models.tiny_models import make_params
from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import folder, table
from vlmjax.models.blip_config import blip_vit
from vlmjax.models.classifier import Classifier, ClassifierConfig
from vlmjax.models.vit import VitConfig

NAMES = {0: "a red star", 1: "a blue ring", 2: "no thing", 3: "two"}
CLIP = VitConfig(width=20, depth=2, heads=5, mlp_dim=28, image_size=24, patch_size=8, activation="gelu")


def reference_of(kind):
    if kind == "vit":
        config = transformers.ViTConfig(**VIT, id2label=NAMES)
        return tiny.redraw(transformers.ViTForImageClassification(config)), (20, 20)
    config = tiny.clip_config(list(tiny.CLIPS)[1])
    config.id2label = NAMES
    return tiny.redraw(transformers.CLIPForImageClassification(config)), (32, 32)


@pytest.fixture(scope="module", params=["clip", "vit"])
def pair(request, tmp_path_factory):
    """(reference, model, params, inputs) of a folder that transformers wrote."""
    reference, size = reference_of(request.param)
    model, params = hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("classifier")))
    return reference, model, params, {"pixel_values": tiny.pixels(3, *size)}


def test_scores_and_names(pair):
    reference, model, params, inputs = pair
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs)).logits
    close(forward(model, params, inputs), expected, 2e-5)
    assert model.config.names == tuple(NAMES.values()) and model.config.labels == ()


def test_loss_and_every_gradient(pair, tmp_path):
    """The reference's gradients, written as if they were its parameters, are ours once they are read.

    CLIP's class has a norm that its scores do not see: zero on either side.
    """
    reference, model, params, inputs = pair
    labels = np.array([2, 0, 3])

    def loss(params):
        scores = jax.nn.log_softmax(model.apply({"params": params}, **inputs))
        return -scores[np.arange(3), labels].mean()

    value, grads = compiled(jax.value_and_grad(loss))(params)
    reference = copy.deepcopy(reference)
    expected = reference(**tiny.to_torch(inputs), labels=torch.from_numpy(labels)).loss
    expected.backward()
    close(value, expected)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    _, theirs = hub.load(tiny.folder_of(reference, tmp_path))
    theirs, ours = table.flatten(theirs), table.flatten(grads)
    assert set(theirs) == set(ours)
    for path, leaf in ours.items():
        like = theirs[path.replace("k_proj/bias", "q_proj/bias")]  # a key's bias has no gradient but rounding
        error = np.abs(np.asarray(leaf) - np.asarray(theirs[path])).max()
        assert error <= 1e-4 * np.abs(np.asarray(like)).max(), path


def test_an_exported_folder_gives_the_same_in_transformers(pair, tmp_path):
    reference, model, params, inputs = pair
    hub.save(model, params, tmp_path)
    ours = forward(model, params, inputs)
    for cls in (type(reference), transformers.AutoModelForImageClassification):
        close(run_exported(cls, tmp_path, inputs).logits, ours, 1e-5)
    config = type(reference.config).from_pretrained(tmp_path)
    assert config.id2label == NAMES and config.label2id == {name: i for i, name in NAMES.items()}


def test_a_folder_comes_back_bit_for_bit(pair, tmp_path):
    _, model, params, _ = pair
    hub.save(model, params, tmp_path)
    again, loaded = hub.load(tmp_path)
    assert again == model and same(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, loaded))


@pytest.mark.parametrize("pool", ["class", "projected"])
def test_a_head_that_transformers_has_no_class_for_lies_beside_its_tower(pool, tmp_path):
    """transformers loads the tower; three lines make the scores of the two tensors beside it."""
    dim = 10 if pool == "projected" else 0
    model = Classifier(ClassifierConfig(CLIP, ("a", "b", "c"), ("n1", "n2", "n3"), pool, dim))
    inputs = {"pixel_values": tiny.pixels(2, 24, 24)}
    params = make_params(model, **inputs)
    hub.save(model, params, tmp_path)
    again, loaded = hub.load(tmp_path)
    assert again == model and same(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, loaded))
    projected = pool == "projected"
    cls = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    out = run_exported(cls, tmp_path, inputs)
    from safetensors.torch import load_file

    head = load_file(tmp_path / folder.EXTRA)
    state = torch.nn.functional.normalize(out.image_embeds, dim=-1) if projected else out.pooler_output
    scores = state @ head["classifier.weight"].T + head["classifier.bias"]
    close(forward(model, params, inputs), scores, 2e-5)
    tower, _ = hub.load(tmp_path, part="image")
    assert tower.config == CLIP


def test_what_no_class_can_express_is_refused():
    names = ("a", "b")
    siglip = VitConfig(
        **{**CLIP.__dict__, "class_token": False, "pre_norm": False, "pool": "attention", "patch_bias": True}
    )
    for config, message in (
        (ClassifierConfig(blip_vit(), names, pool="mean"), "pre_norm"),
        (ClassifierConfig(blip_vit(), names, pool="projected", projection_dim=4), "pre_norm"),
        (ClassifierConfig(siglip, names), "class_token"),
    ):
        model = Classifier(config)
        with pytest.raises(HubError, match=message):
            folder.family_of(model).to_config(model)


def test_a_folder_with_names_out_of_order_is_refused(pair, tmp_path):
    _, model, params, _ = pair
    hub.save(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "a", "2": "b"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match=r"id2label has the places \[0, 2\]"):
        hub.load(tmp_path)
