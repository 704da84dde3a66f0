"""A classifier as a recipe describes it: a new tower or an imported one, with a head at random or from prompts."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from vlmjax import hub
from vlmjax.data.labels import Classes, classes_of
from vlmjax.data.recipe import naming, open_train_sources
from vlmjax.data.sources import Source, together
from vlmjax.errors import RecipeError
from vlmjax.evals.embed import Embedder
from vlmjax.evals.templates import fill, load_templates
from vlmjax.evals.zeroshot import build_classifier
from vlmjax.models.classifier import Classifier, ClassifierConfig
from vlmjax.models.clip import Clip, ClipVision
from vlmjax.models.vit import VitConfig
from vlmjax.ops.resize import resize_positions
from vlmjax.sharding.mesh import replicated

Tree = Any
POSITIONS = "vision_model/embeddings/position_embedding"
TEXTS = 256  # prompts at a time


def classes(config: ClassifierConfig) -> Classes:
    """The classes of a model, which tell of a record which it is of."""
    return Classes(config.names, config.labels)


def make_classifier(recipe: Any, source: Source | None, compute: Mapping[str, str]) -> Classifier:
    """The model of a recipe, without parameters: its own tower, or that of the folder it starts from at its image size.

    Args:
      recipe: of stage "classification".
      source: of training records, whose captions or labels are the classes where no file says them; None opens it.
      compute: `dtype` and `remat` of the tower.

    Raises:
      RecipeError: classes that cannot be told, or a folder without what the head reads.
    """
    image, pool = recipe.model.image, recipe.model.pool
    training = {"patch_dropout": image.patch_dropout, "drop_path": recipe.model.drop_path, **compute}
    dim = recipe.model.projection_dim
    if recipe.init_from:
        with naming("init_from"):
            found = hub.load_model(recipe.init_from)
        tower, dim = _tower_of(found, recipe), _projection_of(found, recipe)
        tower = dataclasses.replace(tower, image_size=image.image_size, **training)
    else:
        tower = VitConfig(**{**image.to_dict(), **training})
    with naming("data.classes"):
        known = classes_of(recipe.data.classes, source or together(open_train_sources(recipe)[0]))
    return Classifier(
        ClassifierConfig(tower, known.names, known.labels, pool, dim if pool == "projected" else 0)
    )


def _tower_of(found: Any, recipe: Any) -> VitConfig:
    """The image tower of whatever a folder holds."""
    config = getattr(found.config, "image", found.config)
    if not isinstance(config, VitConfig):
        raise RecipeError(
            f"config.init_from={recipe.init_from!r} holds a {type(found).__name__}, which has no image tower"
        )
    size = recipe.model.image.image_size
    if size != config.image_size and size % config.patch_size:
        raise RecipeError(
            f"config.model.image.image_size={size} is not a multiple of the model's patch_size={config.patch_size}"
        )
    return config


def _projection_of(found: Any, recipe: Any) -> int:
    """Width of the space that the tower's state is projected into; 0 where the head reads something else."""
    if recipe.model.pool != "projected":
        return 0
    holder = found if isinstance(found, ClipVision) else found.config
    dim = holder.projection_dim if isinstance(found, (Clip, ClipVision, Classifier)) else 0
    if not dim or (recipe.model.head_from and not isinstance(found, Clip)):
        raise RecipeError(
            f"config.model.pool='projected', config.model.head_from={recipe.model.head_from!r}: config.init_from="
            f"{recipe.init_from!r} holds a {type(found).__name__} without CLIP's projection or, for prompts, its text "
            "tower; start from a CLIPModel, or leave pool='class' and head_from empty"
        )
    return dim


def imported(recipe: Any) -> dict[str, str]:
    """Which top-level groups of parameters a recipe imports as they are, and from where."""
    groups = ("vision_model", "visual_projection")[: 1 + (recipe.model.pool == "projected")]
    return dict.fromkeys(groups, recipe.init_from) if recipe.init_from else {}


def import_classifier(
    recipe: Any,
    model: Classifier,
    places: Tree,
    fresh: Callable[[], Tree],
    only: Callable[[str], bool] | None = None,
) -> Tree:
    """Parameters of a recipe's model, begun with a folder's tower; they pass through the host.

    The head is that of a folder with the same classes, or made of prompts, or new.

    Args:
      recipe: with `init_from`.
      model: from `make_classifier`.
      places: nested dict with the sharding of every parameter.
      fresh: () -> random parameters of the whole model, traceable.
      only: of a parameter's path, whether it is wanted, and nothing else then; None: the whole model is.
    """
    # On one CPU: of frozen parameters a checkpoint has the digest alone, and no two kinds of devices add up alike.
    with naming("init_from"), jax.default_device(jax.local_devices(backend="cpu")[0]):
        source, params = hub.load(recipe.init_from)
        groups = {name: params[name] for name in imported(recipe)}
        flat = traverse_util.flatten_dict(groups, sep="/")
        old = getattr(source.config, "image", source.config).grid
        table, first = jnp.asarray(flat[POSITIONS]), int(model.config.image.class_token)
        flat[POSITIONS] = resize_positions(table, old, model.config.image.grid, prefix=first)
    targets = traverse_util.flatten_dict(places, sep="/")
    head = ("classifier/kernel", "classifier/bias")
    if only is None or any(map(only, head)):
        flat |= dict(
            zip(head, _head(recipe, model, source, params, targets[POSITIONS].mesh, fresh), strict=True)
        )
    wanted = [path for path in flat if only is None or only(path)]
    placed = {path: jax.device_put(np.asarray(flat[path]), targets[path]) for path in wanted}
    return traverse_util.unflatten_dict(placed, sep="/")


def _head(
    recipe: Any, model: Classifier, source: Any, params: Tree, mesh: Mesh, fresh: Callable[[], Tree]
) -> tuple[Any, Any]:
    """Kernel and bias."""
    config = model.config
    if recipe.model.head_from:
        with naming("model.head_from"):
            kernel = prompt_head(recipe, config.names, source, params, mesh)
        return kernel, np.zeros(len(config.names), np.float32)
    same = isinstance(source, Classifier) and source.config.names == config.names
    if same and source.config.pool == config.pool:
        return params["classifier"]["kernel"], params["classifier"]["bias"]
    new = jax.jit(lambda: fresh()["classifier"])()
    return new["kernel"], new["bias"]


def prompt_head(recipe: Any, names: tuple[str, ...], source: Clip, params: Tree, mesh: Mesh) -> np.ndarray:
    """The zero-shot classifier of class names times the temperature, float32 [projection_dim, classes].

    So a head without bias begins as CLIP's own scores (WiSE-FT, 2109.01903, section 3).
    """
    tokenizer, _ = hub.load_processor(recipe.init_from)
    if tokenizer is None:
        raise RecipeError(
            f"config.init_from={recipe.init_from!r} has no tokenizer for the prompts of model.head_from"
        )
    templates = load_templates(recipe.model.head_from)
    prompts = [fill(template, name) for name, template in itertools.product(names, templates)]
    words = jax.device_put(params, replicated(mesh))
    features = Embedder(source, tokenizer, None, mesh).texts(words, prompts, TEXTS)
    directions = build_classifier(features.reshape(len(names), len(templates), -1))
    return np.exp(np.float32(params["logit_scale"])) * directions.T


def to_json(config: ClassifierConfig) -> dict[str, Any]:
    """Contents of model.json."""
    return {"kind": "classifier", **dataclasses.asdict(config)}


def from_json(value: Mapping[str, Any]) -> Classifier:
    """Inverse of `to_json`, as a module."""
    image = dict(value["image"])
    if isinstance(image["image_size"], list):
        image["image_size"] = tuple(image["image_size"])
    lists = {name: tuple(value[name]) for name in ("names", "labels")}
    rest = {name: value[name] for name in ("pool", "projection_dim")}
    return Classifier(ClassifierConfig(VitConfig(**image), **lists, **rest))
