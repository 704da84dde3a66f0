"""BLIP as a recipe describes it: new, from towers that were trained for images and for words, or a whole folder."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vlmjax import hub
from vlmjax.data import text
from vlmjax.data.recipe import DEC, ENC, naming
from vlmjax.errors import RecipeError, UserError
from vlmjax.hub.bert_head import has_head, load_head
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.blip import Blip
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.blip_start import from_pretraining, from_towers
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.models.clip import ClipVision
from vlmjax.models.vit import VitConfig

KINDS = {"image_from": ClipVision, "text_from": Bert}
AnyBlip = Blip | BlipVqa | BlipNlvr
# The model of each stage.
FORMS: dict[str, type] = {"blip": Blip, "blip_vqa": BlipVqa, "blip_nlvr": BlipNlvr}
# Top-level groups of parameters that a stage's model takes from one it begins with.
_GROUPS = {
    "blip": ("vision_model", "text_model", "vision_proj", "text_proj", "itm_head", "temp"),
    "blip_vqa": ("vision_model", "text_encoder", "text_decoder"),
    "blip_nlvr": ("vision_model", "text_encoder"),
}
PARTS = {"model.image_from": "image"}  # what is read of a folder that may hold more, such as a classifier's
Tree = Any


def blip_config(recipe: Any, tokenizer: text.Tokenizer, compute: Mapping[str, str]) -> BlipConfig:
    """BlipConfig of a recipe's `model` group.

    Args:
      recipe: of one of BLIP's stages.
      tokenizer: with the tokens DEC and ENC.
      compute: `dtype` and `remat` of both transformers.

    Raises:
      RecipeError: a vocabulary that does not hold the tokenizer.
    """
    image, words = recipe.model.image.to_dict(), recipe.model.text
    form = {"layer_norm_eps": 1e-6, "class_token": True, "pre_norm": False, "patch_bias": True}
    form |= {"pool": "none", "init": "normal", "drop_path": recipe.model.drop_path}
    vocabulary = words.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise RecipeError(
            f"tokenizer {recipe.data.tokenizer!r} has {tokenizer.vocab_size} tokens with {DEC} and {ENC}, the model "
            f"embeds {vocabulary}: set config.model.text.vocab_size to 0 or at least that"
        )
    sizes = {key: words[key] for key in ("width", "depth", "heads", "mlp_dim", "activation", "dropout")}
    return BlipConfig(
        image=VitConfig(**image, **form, **compute),
        text=BertConfig(
            **sizes,
            **compute,
            vocab_size=vocabulary,
            max_length=max(words.positions, words.max_length),
            type_vocab_size=None,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projection_dim=recipe.model.projection_dim,
        bos_token_id=tokenizer.token_id(DEC),
        enc_token_id=tokenizer.token_id(ENC),
        sep_token_id=tokenizer.eos_token_id,
        label_smoothing=recipe.loss.lm_smoothing,
    )


def make_blip(recipe: Any, tokenizer: text.Tokenizer, compute: Mapping[str, str]) -> AnyBlip:
    """The model of a recipe, without parameters: its own, or that of the folder it starts from at its image size.

    Raises:
      RecipeError: a folder that holds something else, or another model's tokenizer.
    """
    form = FORMS[recipe.stage]
    if not recipe.init_from:
        for key, kind in KINDS.items():
            if recipe.model[key]:
                _model_in(recipe, f"model.{key}", kind)
        return form(blip_config(recipe, tokenizer, compute))
    config = _model_in(recipe, "init_from", Blip if form is Blip else Blip | form).config
    if tokenizer.vocab_size > config.text.vocab_size or tokenizer.token_id(DEC) != config.bos_token_id:
        raise RecipeError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and {DEC} as id {tokenizer.token_id(DEC)}, the model of "
            f"config.init_from embeds {config.text.vocab_size} and begins texts with {config.bos_token_id}: it is "
            "another model's tokenizer"
        )
    if recipe.model.text.max_length > config.text.max_length:
        raise RecipeError(
            f"config.model.text.max_length={recipe.model.text.max_length}: the model of config.init_from has "
            f"{config.text.max_length} positions; give at most that"
        )
    decided = {"image_size": recipe.model.image.image_size, "drop_path": recipe.model.drop_path}
    image = dataclasses.replace(config.image, **decided, **compute)
    return form(dataclasses.replace(config, image=image, text=dataclasses.replace(config.text, **compute)))


def _model_in(recipe: Any, key: str, kind: Any) -> Any:
    """The model of a folder that the recipe names under `key`, of one of whose kinds it must be."""
    name = recipe[key] if key in recipe else recipe.model[key.removeprefix("model.")]
    with naming(key):
        found = hub.load_model(name, part=PARTS.get(key))
    if not isinstance(found, kind):
        raise RecipeError(
            f"config.{key}={name!r} holds a {type(found).__name__}; stage {recipe.stage!r} needs a {_said(kind)} there"
        )
    return found


def _said(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else " or a ".join(one.__name__ for one in kind.__args__)


def imported(recipe: Any) -> dict[str, str]:
    """Which top-level groups of parameters a recipe imports, and from where."""
    if recipe.init_from:
        return dict.fromkeys(_GROUPS[recipe.stage], recipe.init_from)
    named = {"vision_model": recipe.model.image_from, "text_model": recipe.model.text_from}
    return {group: name for group, name in named.items() if name}


def import_blip(
    recipe: Any,
    model: AnyBlip,
    places: Tree,
    fresh: Callable[[], Tree],
    only: Callable[[str], bool] | None = None,
) -> Tree:
    """Parameters of a recipe's model: of a whole folder, or new ones begun with those of a tower and of BERT.

    They pass through the host, where BLIP's few hundred million find room.

    Args:
      recipe: with `init_from`, `model.image_from` or `model.text_from`.
      model: from `make_blip`.
      places: nested dict with the sharding of every parameter.
      fresh: () -> random parameters of the whole model, traceable.
      only: of a parameter's path, whether it is wanted, and nothing else then; None: the whole model is.
    """
    if recipe.init_from:
        with naming("init_from"):
            source, params = hub.load(recipe.init_from)
        # On one CPU: of frozen parameters a checkpoint has the digest alone, and no two kinds of devices add up alike.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            # Values for what is new in a form: its head, for one.
            start = jax.eval_shape(fresh) if recipe.stage == "blip" else jax.jit(fresh)()
            params = from_pretraining(model, start, source, params)
        return _placed(params, places, only)
    parts = {}
    for key, name in (("image", recipe.model.image_from), ("text", recipe.model.text_from)):
        if name:
            found, params = hub.load(name, part=PARTS.get(f"model.{key}_from"))
            parts[key] = (getattr(found.config, key, found.config), params)
    if recipe.model.text_from and has_head(recipe.model.text_from):
        parts["head"] = load_head(recipe.model.text_from)
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            started = from_towers(model, jax.jit(fresh)(), **parts)
    except UserError as error:
        raise RecipeError(
            f"config.model: {error}; give model.image and model.text the sizes of the folders"
        ) from None
    return _placed(started, places, only)


def _placed(params: Tree, places: Tree, only: Callable[[str], bool] | None) -> Tree:
    """Parameters where they belong, those alone that are wanted."""
    flat, targets = (traverse_util.flatten_dict(dict(tree), sep="/") for tree in (params, places))
    wanted = [path for path in flat if only is None or only(path)]
    return traverse_util.unflatten_dict(
        {path: jax.device_put(np.asarray(flat[path]), targets[path]) for path in wanted}, sep="/"
    )


def to_json(model: AnyBlip) -> dict[str, Any]:
    """Contents of model.json."""
    kind = next(stage for stage, form in FORMS.items() if type(model) is form)
    return {"kind": kind, **dataclasses.asdict(model.config)}


def from_json(value: Mapping[str, Any]) -> AnyBlip:
    """Inverse of `to_json`, as a module."""
    image, words = dict(value["image"]), dict(value["text"])
    if isinstance(image["image_size"], list):
        image["image_size"] = tuple(image["image_size"])
    rest = {name: own for name, own in value.items() if name not in ("kind", "image", "text")}
    return FORMS[value["kind"]](BlipConfig(image=VitConfig(**image), text=BertConfig(**words), **rest))
