"""From a validated recipe to the objects of a run: source, tokenizer, transforms, model, imported parameters."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vlmjax.config import Config, completed
from vlmjax.config_checks import BLIP_STAGES
from vlmjax.data import text
from vlmjax.data.images import EvalTransform
from vlmjax.data.labels import Classes
from vlmjax.data.recipe import naming, open_tokenizer, special_tokens, tokenizer_name
from vlmjax.data.sources import Source
from vlmjax.errors import CheckpointError, RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.classifier import Classifier
from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig
from vlmjax.ops.resize import resize_positions
from vlmjax.sharding.mesh import replicated
from vlmjax.training import blip_parts, classifier_parts, vlm_parts
from vlmjax.training.workdir import Workdir

POSITIONS = "vision_model/embeddings/position_embedding"


def make_tokenizer(recipe: Any, source: Source | None, workdir: Workdir) -> text.Tokenizer | None:
    """The recipe's tokenizer, kept in `workdir/tokenizer` so that the run can be resumed and exported alone.

    "bpe:N" trains one on captions of `source`: the same on every process, so that none waits for another. An imported
    model keeps the tokenizer it was trained with. Stage "classification" has no texts, and None.

    Raises:
      RecipeError: where it cannot be read, or the folder holds a run with another one.
    """
    if recipe.stage == "classification":
        return None
    folder, length = workdir.path("tokenizer"), text_length(recipe)
    name, before = tokenizer_name(recipe), _tokenizer_of(workdir)
    begun = workdir.has_checkpoints()
    # Without a checkpoint the run begins anew, perhaps with other data: then "bpe:N" is learned from them.
    if folder.is_dir() and before == name and (begun or not name.startswith("bpe:")):
        with naming("data.tokenizer"):
            return text.load(str(folder), length)
    if before and before != name and begun:
        raise RecipeError(
            f"--workdir={workdir.root} holds a run with tokenizer {before!r}, this recipe has {name!r}: "
            "name another folder, or give that run's own recipe"
        )
    partial = workdir.path("tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with naming("init_from" if name == recipe.init_from else "data.tokenizer"):
        open_tokenizer(name, source, length, special_tokens(recipe)).save(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return text.load(str(folder), length)


def text_length(recipe: Any) -> int:
    """Tokens that a text of a recipe may have."""
    return recipe.data.max_length if recipe.stage == "generative" else recipe.model.text.max_length


def _tokenizer_of(workdir: Workdir) -> str:
    """The tokenizer of the run that began in this folder; one left by a run that ended before it began is not used."""
    path = workdir.path("recipe.json")
    return tokenizer_name(completed(read_json(path))) if path.exists() else ""


def eval_transform(recipe: Any, image_size: tuple[int, int]) -> EvalTransform:
    """The deterministic preprocessing of evaluation and export: shorter side to the image size, centre crop.

    With `data.pad_to_square` the image is made a square before, so that all of it is seen. BLIP squeezes images into
    their shape, whatever their own is (salesforce/BLIP, data/__init__.py).
    """
    squeezed = recipe.stage in BLIP_STAGES
    return EvalTransform(
        image_size if squeezed else min(image_size),
        None if squeezed else image_size,
        mean=tuple(recipe.data.mean),
        std=tuple(recipe.data.std),
        background=tuple(recipe.data.background),
        pad=recipe.data.pad_to_square,
    )


def make_model(
    recipe: Any, tokenizer: text.Tokenizer | None, source: Source | None = None
) -> Clip | Vlm | blip_parts.AnyBlip | Classifier:
    """The model of a recipe, without parameters: what its stage trains.

    With `init_from` the sizes, activation and token rules are those of the imported folder, never the recipe's;
    the recipe keeps deciding image size, patch dropout, compute dtype and remat. `source` is the training data, which
    may name a classifier's classes; it is opened where it is needed and not given.
    """
    if recipe.stage == "generative":
        compute = {"dtype": compute_dtype(recipe), "remat": recipe.model.remat}
        return Vlm(vlm_parts.vlm_config(recipe, tokenizer, compute))
    if recipe.stage in BLIP_STAGES:
        compute = {"dtype": compute_dtype(recipe), "remat": recipe.model.remat}
        return blip_parts.make_blip(recipe, tokenizer, compute)
    if recipe.stage == "classification":
        compute = {"dtype": compute_dtype(recipe), "remat": recipe.model.remat}
        return classifier_parts.make_classifier(recipe, source, compute)
    if not recipe.init_from:
        return Clip(clip_config(recipe, tokenizer))
    from vlmjax import hub

    with naming("init_from"):
        model = hub.load_model(recipe.init_from)
    if not isinstance(model, Clip):
        raise RecipeError(
            f"config.init_from={recipe.init_from!r} holds a {type(model).__name__}; stage 'contrastive' needs a dual "
            "encoder (CLIPModel or VisionTextDualEncoderModel)"
        )
    config = _with_compute(model.config, recipe)
    _check_vocabulary(config.text.vocab_size, tokenizer, tokenizer_name(recipe))
    _check_end(config.text, tokenizer, tokenizer_name(recipe))
    return Clip(config)


def classes_of(model: Any) -> Classes | None:
    """The classes of a classifier, by which its training data are labelled; None for other models."""
    return classifier_parts.classes(model.config) if isinstance(model, Classifier) else None


def imported(recipe: Any) -> dict[str, str]:
    """Which top-level groups of parameters a recipe imports, and from where."""
    if recipe.stage == "generative":
        return vlm_parts.imported(recipe)
    if recipe.stage in BLIP_STAGES:
        return blip_parts.imported(recipe)
    if recipe.stage == "classification":
        return classifier_parts.imported(recipe)
    groups = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")
    return dict.fromkeys(groups, recipe.init_from) if recipe.init_from else {}


def import_params(
    recipe: Any,
    model: Clip | Vlm | blip_parts.AnyBlip | Classifier,
    places: Any,
    fresh: Callable[[], Any],
    only: Callable[[str], bool] | None = None,
) -> Any:
    """The parameters that a recipe imports, every device reading its own part of the files; new ones for the rest.

    At another image size than the folder's, position embeddings are resampled to the new grid, once and for all.

    Args:
      recipe: with `init_from`.
      model: from `make_model`.
      places: nested dict with the sharding of every parameter of `model`.
      fresh: () -> random parameters of the whole model, traceable.
      only: of an imported parameter's path, whether it is wanted, and nothing else then; None: the whole model is.
    """
    from vlmjax import hub

    if isinstance(model, Vlm):
        return vlm_parts.import_parts(recipe, model, places, fresh, only)
    if isinstance(model, blip_parts.AnyBlip):
        return blip_parts.import_blip(recipe, model, places, fresh, only)
    if isinstance(model, Classifier):
        return classifier_parts.import_classifier(recipe, model, places, fresh, only)

    flat, new = traverse_util.flatten_dict(places, sep="/"), model.config.image.grid
    with naming("init_from"):
        old = hub.load_model(recipe.init_from).config.image.grid
        if old == new:
            return hub.load(recipe.init_from, shardings=places, only=only)[1]
        # The table's own placement may not divide the old grid: it is read whole, and placed once it is resampled.
        whole = flat | {POSITIONS: replicated(flat[POSITIONS].mesh)}
        whole = traverse_util.unflatten_dict(whole, sep="/")
        _, params = hub.load(recipe.init_from, shardings=whole, only=only)
    params = traverse_util.flatten_dict(params, sep="/")
    if POSITIONS not in params:
        return traverse_util.unflatten_dict(params, sep="/")
    # On one CPU: where the tower is frozen a checkpoint has its digest alone, and no two kinds of devices add up alike.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        table = np.asarray(params[POSITIONS].addressable_data(0))
        table = np.asarray(jax.jit(resize_positions, static_argnums=(1, 2))(table, old, new))
    params[POSITIONS] = jax.make_array_from_callback(table.shape, flat[POSITIONS], lambda part: table[part])
    return traverse_util.unflatten_dict(params, sep="/")


def clip_config(recipe: Any, tokenizer: text.Tokenizer) -> ClipConfig:
    """ClipConfig of a recipe's `model` group; token ids that mean something come from the tokenizer."""
    image, words = recipe.model.image, recipe.model.text
    compute = {"dtype": compute_dtype(recipe), "remat": recipe.model.remat}
    vocabulary = words.vocab_size or tokenizer.vocab_size
    _check_vocabulary(vocabulary, tokenizer, recipe.data.tokenizer)
    size = {key: words[key] for key in ("width", "depth", "heads", "mlp_dim", "max_length", "activation")}
    if words.kind == "bert":
        tower = BertConfig(
            vocab_size=vocabulary,
            dropout=words.dropout,
            pad_token_id=tokenizer.pad_token_id,
            **size,
            **compute,
        )
    else:
        if words.dropout:
            raise RecipeError(
                f"config.model.text.dropout={words.dropout}: CLIP's text tower has none; use kind='bert' or 0"
            )
        tower = TextConfig(
            vocab_size=vocabulary,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **size,
            **compute,
        )
    _check_end(tower, tokenizer, recipe.data.tokenizer)
    return ClipConfig(
        image=VitConfig(**image.to_dict(), **compute),
        text=tower,
        projection_dim=recipe.model.projection_dim,
        logit_scale_init=math.log(recipe.loss.logit_scale_init),
    )


def compute_dtype(recipe: Any, platform: str = "") -> str:
    """The recipe's dtype, with "auto" resolved by the backend: CPUs compute bfloat16 more slowly than float32."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def _with_compute(config: ClipConfig, recipe: Any) -> ClipConfig:
    """An imported configuration with what the recipe decides."""
    size, patch = recipe.model.image.image_size, config.image.patch_size
    if size != config.image.image_size and size % patch:
        raise RecipeError(
            f"config.model.image.image_size={size} is not a multiple of the model's patch_size={patch}"
        )
    compute = {"dtype": compute_dtype(recipe), "remat": recipe.model.remat}
    dropout = recipe.model.image.patch_dropout
    image = dataclasses.replace(config.image, image_size=size, patch_dropout=dropout, **compute)
    return dataclasses.replace(config, image=image, text=dataclasses.replace(config.text, **compute))


def _check_vocabulary(size: int, tokenizer: text.Tokenizer, name: str) -> None:
    if tokenizer.vocab_size > size:
        raise RecipeError(
            f"tokenizer {name!r} has {tokenizer.vocab_size} tokens, the text tower embeds {size}: "
            "set config.model.text.vocab_size to at least that, or use the model's own tokenizer"
        )


def _check_end(words: TextConfig | BertConfig, tokenizer: text.Tokenizer, name: str) -> None:
    """Refuse a tokenizer whose texts do not end where CLIP's text tower looks for their meaning."""
    if isinstance(words, BertConfig):
        return
    ids, end = tokenizer.encode("a"), words.eos_token_id
    # 2 is the eos id of CLIP's first Hugging Face configurations: it stands for "the largest id of the text".
    if not ids or ids[-1] != (max(ids) if end == 2 else end):
        raise RecipeError(
            f"tokenizer {name!r} ends a text with id {ids[-1] if ids else None}, the text tower reads it at id {end}: "
            "use the model's own tokenizer, or one that ends every text with its end token"
        )


def model_to_json(model: Clip | Vlm | blip_parts.AnyBlip | Classifier) -> dict[str, Any]:
    """A model's configuration as json, for `workdir/model.json`."""
    config = model.config
    if isinstance(config, VlmConfig):
        return vlm_parts.to_json(config)
    if isinstance(model, blip_parts.AnyBlip):
        return blip_parts.to_json(model)
    if isinstance(model, Classifier):
        return classifier_parts.to_json(config)
    kind = "bert" if isinstance(config.text, BertConfig) else "clip"
    value = dataclasses.asdict(config)
    return {**value, "text": {"kind": kind, **value["text"]}}


def model_from_json(value: Mapping[str, Any]) -> Clip | Vlm | blip_parts.AnyBlip | Classifier:
    """Inverse of `model_to_json`, as a module."""
    if value.get("kind") == "vlm":
        return vlm_parts.from_json(value)
    if value.get("kind") in blip_parts.FORMS:
        return blip_parts.from_json(value)
    if value.get("kind") == "classifier":
        return classifier_parts.from_json(value)
    words = dict(value["text"])
    tower = {"bert": BertConfig, "clip": TextConfig}[words.pop("kind")]
    image = dict(value["image"])
    if isinstance(image["image_size"], list):
        image["image_size"] = tuple(image["image_size"])
    return Clip(ClipConfig(**{**value, "image": VitConfig(**image), "text": tower(**words)}))


def read_run(folder: Workdir) -> tuple[Config, Clip | Vlm | blip_parts.AnyBlip | Classifier]:
    """The recipe of the run in a folder, and its model. Raises CheckpointError where it is not that of a run."""
    for name in ("recipe.json", "model.json"):
        if not folder.path(name).exists():
            raise CheckpointError(f"{folder.root}: not the folder of a run (it lacks {name})")
    recipe = completed(read_json(folder.path("recipe.json")))
    return recipe, model_from_json(read_json(folder.path("model.json")))


def read_json(path: Path) -> Any:
    """The json value in a file of a run; raises CheckpointError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): restore it, or name another work folder"
        ) from None
