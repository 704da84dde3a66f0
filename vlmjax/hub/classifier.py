"""Image classifiers: CLIPForImageClassification, ViTForImageClassification, and towers with a head beside them.

transformers' class for CLIP reads the mean of the patches' states, its class for ViT the normalised class token. A head
that reads anything else of a CLIP has no class there: its folder is the tower's, which transformers loads, and the head
lies in vlmjax_extra.safetensors, with its form in config.json under "vlmjax_pool".

Source of names: transformers, models/{clip/modeling_clip,vit/modeling_vit}.py.
"""

from collections.abc import Mapping
from typing import Any

from vlmjax.errors import HubError
from vlmjax.hub import clip, vit
from vlmjax.hub.family import Family, only
from vlmjax.hub.table import Names, Row, linear
from vlmjax.models.classifier import Classifier, ClassifierConfig, example_inputs

# Keys of ours in config.json: what the head reads where the class does not say it, and what data files call classes.
POOL_KEY, LABELS_KEY = "vlmjax_pool", "vlmjax_labels"


def _classes(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names and labels of a folder; a file of two classes need not name them."""
    found = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = {int(place): str(name) for place, name in found.items()}
    if sorted(names) != list(range(len(names))):
        raise HubError(f"id2label has the places {sorted(names)}; expected 0 to {len(names) - 1}")
    return {
        "names": tuple(names[place] for place in range(len(names))),
        "labels": tuple(config.get(LABELS_KEY) or ()),
    }


def _class_keys(config: ClassifierConfig) -> dict[str, Any]:
    names = config.names
    keys = {
        "id2label": {str(place): name for place, name in enumerate(names)},
        "label2id": {name: place for place, name in enumerate(names)},
    }
    return keys | ({LABELS_KEY: list(config.labels)} if config.labels else {})


def _head() -> list[Row]:
    return linear("classifier", "classifier")


# ---- what transformers has a class for


def _to_mean(config: Mapping[str, Any]) -> Classifier:
    image = clip.to_vit(clip.vision_half(config))
    return Classifier(ClassifierConfig(image, pool="mean", **_classes(config)))


def _from_mean(model: Classifier) -> dict[str, Any]:
    tower = {"vision_config": clip.from_vit(model.config.image), "projection_dim": 512}
    return {"model_type": "clip", **tower, **_class_keys(model.config)}


def _to_vit(config: Mapping[str, Any]) -> Classifier:
    return Classifier(ClassifierConfig(vit.to_vit(config), **_classes(config)))


def _from_vit(model: Classifier) -> dict[str, Any]:
    only(model.config, "ViTForImageClassification", pool="class")
    return vit.from_vit(model.config.image) | _class_keys(model.config)


CLIP = Family(
    architecture="CLIPForImageClassification",
    to_model=_to_mean,
    to_config=_from_mean,
    rows=lambda m: clip.vision_rows(m.config.image) + _head(),
    names=clip.CLIP.names,
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor=None,
)
VIT = Family(
    architecture="ViTForImageClassification",
    to_model=_to_vit,
    to_config=_from_vit,
    rows=lambda m: [row.under("vit.", "") for row in vit.vit_rows(m.config.image)] + _head(),
    names=Names(((r"^deit\.", "vit."),)),
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor=None,
)


# ---- a tower of CLIP with a head beside it


def _to_beside(config: Mapping[str, Any]) -> Classifier:
    pool = config[POOL_KEY]
    dim = (clip.VISION_DEFAULTS | config)["projection_dim"] if pool == "projected" else 0
    return Classifier(
        ClassifierConfig(clip.to_vit(config), pool=pool, projection_dim=dim, **_classes(config))
    )


def _from_beside(model: Classifier) -> dict[str, Any]:
    c = model.config
    tower = clip.from_vit(c.image, c.projection_dim or None)
    return tower | _class_keys(c) | {POOL_KEY: c.pool}


def _beside_rows(model: Classifier) -> list[Row]:
    projection = linear("visual_projection", "visual_projection", bias=False) * (
        model.config.pool == "projected"
    )
    return clip.vision_rows(model.config.image) + projection + _head()


CLASS = clip.VISION._replace(
    to_model=_to_beside,
    to_config=_from_beside,
    rows=_beside_rows,
    inputs=lambda m: example_inputs(m.config),
    within={},
    aside=lambda m: frozenset(name for row in _head() for name in row.names()),
)
PROJECTED = CLASS._replace(architecture=clip.VISION_PROJECTED.architecture)
BESIDE = {"class": CLASS, "projected": PROJECTED}


def family_of(model: Classifier) -> Family:
    """The class that a classifier is written as; its `to_config` refuses what that class cannot express."""
    c = model.config
    if c.pool == "mean":
        return CLIP
    return VIT if c.pool == "class" and c.image.class_token and not c.image.pre_norm else BESIDE[c.pool]
