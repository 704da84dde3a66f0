"""The parts of a vision-language model that a recipe names: imported towers and language models, or new ones."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from vlmjax import hub
from vlmjax.data import text
from vlmjax.data.conversation import MARK
from vlmjax.data.recipe import naming
from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import Decoder, DecoderConfig
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig
from vlmjax.ops.rotary import Rope
from vlmjax.sharding.mesh import replicated

Tree = Any

# An embedding has a multiple of so many rows, as LLaVA's checkpoints do: a vocabulary is cut over devices.
ROWS = 64
# Rotary positions cost nothing, and a later stage may have longer rows.
LEAST_POSITIONS = 2048


def vlm_config(recipe: Any, tokenizer: text.Tokenizer, compute: Mapping[str, str]) -> VlmConfig:
    """VlmConfig of a recipe's `model` group, or of the folder that it starts from.

    Args:
      recipe: of stage "generative".
      tokenizer: with the token that stands for images.
      compute: `dtype` and `remat` of the towers.

    Raises:
      RecipeError: a folder that holds something else, or a tokenizer of another model.
    """
    if recipe.init_from:
        with naming("init_from"):
            model = hub.load_model(recipe.init_from)
        if not isinstance(model, Vlm):
            raise RecipeError(
                f"config.init_from={recipe.init_from!r} holds a {type(model).__name__}; stage 'generative' needs a "
                "whole vision-language model. Its parts come by model.image_from and model.language_from"
            )
        config = model.config
        _check_same(recipe, config)
    else:
        bridge = recipe.model.bridge
        config = VlmConfig(
            image=_image(recipe),
            text=_language(recipe, tokenizer),
            bridge=BridgeConfig(bridge.kind, bridge.depth, bridge.activation),
            image_token_id=tokenizer.token_id(MARK),
            feature_layers=tuple(recipe.model.feature_layers),
            keep_class=recipe.model.keep_class,
        )
    if tokenizer.vocab_size > config.text.vocab_size or tokenizer.token_id(MARK) != config.image_token_id:
        raise RecipeError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and {MARK} as id {tokenizer.token_id(MARK)}, the model "
            f"embeds {config.text.vocab_size} and expects {config.image_token_id}: it is another model's tokenizer"
        )
    if recipe.data.max_length > config.text.max_length:
        raise RecipeError(
            f"config.data.max_length={recipe.data.max_length}: the language model has {config.text.max_length} "
            "positions; make rows shorter"
        )
    words = dataclasses.replace(config.text, **compute)
    image = dataclasses.replace(config.image, **compute)
    bridge = dataclasses.replace(config.bridge, dtype=compute["dtype"])
    return dataclasses.replace(config, image=image, text=words, bridge=bridge)


def _check_same(recipe: Any, config: VlmConfig) -> None:
    """Raise RecipeError for what an imported model has otherwise than the recipe, which would go unheeded."""
    model = recipe.model
    for key, wanted, found in (
        ("image.image_size", model.image.image_size, config.image.image_size),
        ("image.patch_size", model.image.patch_size, config.image.patch_size),
        ("feature_layers", tuple(model.feature_layers), config.feature_layers),
        ("keep_class", model.keep_class, config.keep_class),
    ):
        if wanted != found:
            raise RecipeError(
                f"config.model.{key}={wanted}: the model of config.init_from={recipe.init_from!r} has {found}; "
                "set it to that"
            )


def _image(recipe: Any) -> VitConfig:
    if not recipe.model.image_from:
        return VitConfig(**recipe.model.image.to_dict())
    with naming("model.image_from"):
        model = hub.load_model(recipe.model.image_from, part="image")
    config, size = model.config, recipe.model.image.image_size
    if config.image_size != size or config.patch_size != recipe.model.image.patch_size:
        raise RecipeError(
            f"config.model.image_from={recipe.model.image_from!r} takes images of {config.image_size} pixels in "
            f"patches of {config.patch_size}; the recipe says {size} and {recipe.model.image.patch_size}: set "
            "config.model.image.image_size and patch_size to the tower's"
        )
    return config


def _language(recipe: Any, tokenizer: text.Tokenizer) -> DecoderConfig:
    rows = -(-tokenizer.vocab_size // ROWS) * ROWS
    if recipe.model.language_from:
        with naming("model.language_from"):
            model = hub.load_model(recipe.model.language_from)
        if not isinstance(model, Decoder):
            raise RecipeError(
                f"config.model.language_from={recipe.model.language_from!r} holds a {type(model).__name__}; a causal "
                "language model is needed"
            )
        size = model.config.vocab_size
        return dataclasses.replace(model.config, vocab_size=size if tokenizer.vocab_size <= size else rows)
    c = recipe.model.language
    if c.width % c.heads or c.heads % c.kv_heads:
        raise RecipeError(
            f"config.model.language: width={c.width} is to be a multiple of heads={c.heads}, and that of "
            f"kv_heads={c.kv_heads}"
        )
    return DecoderConfig(
        width=c.width,
        depth=c.depth,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.width // c.heads,
        mlp_dim=c.mlp_dim,
        vocab_size=max(c.vocab_size, rows),
        max_length=max(recipe.data.max_length, LEAST_POSITIONS),
        rope=Rope(c.rope_theta),
        tied=c.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )


def imported(recipe: Any) -> dict[str, str]:
    """Which groups of parameters are imported, and from where; empty for a model that is new throughout."""
    if recipe.init_from:
        return dict.fromkeys(("vision_model", "bridge", "language_model"), recipe.init_from)
    model = recipe.model
    named = {"vision_model": model.image_from, "language_model": model.language_from}
    return {group: address for group, address in named.items() if address}


def import_parts(
    recipe: Any, model: Vlm, places: Tree, fresh: Any, only: Callable[[str], bool] | None = None
) -> Tree:
    """Parameters of a model: imported ones read by each device from the files, the others new.

    Args:
      recipe: with something to import.
      model: its model.
      places: nested dict with the sharding of every parameter.
      fresh: () -> random parameters of the whole model, traceable.
      only: as of `build.import_params`.
    """
    if recipe.init_from:
        with naming("init_from"):
            return hub.load(recipe.init_from, shardings=places, only=only)[1]
    sources = imported(recipe)
    new = [group for group in places if group not in sources and only is None]
    params = jax.jit(
        lambda: {group: fresh()[group] for group in new},
        out_shardings={group: places[group] for group in new},
    )()
    if folder := sources.get("vision_model"):
        tower = {"vision_model": places["vision_model"]}
        with naming("model.image_from"):
            params |= hub.load(folder, part="image", shardings=tower, only=only)[1]
    if folder := sources.get("language_model"):
        wanted = only and (lambda path: only(f"language_model/{path}"))
        with naming("model.language_from"):
            words = _import_language(folder, model.config.text, places["language_model"], wanted)
        params |= {"language_model": words} if words else {}
    return params


def _import_language(
    folder: str, config: DecoderConfig, places: Tree, only: Callable[[str], bool] | None
) -> Tree:
    """A language model, with rows for new tokens where the vocabulary has grown: each the mean of all others."""
    if hub.load_model(folder).config.vocab_size == config.vocab_size:
        return hub.load(folder, shardings=places, only=only)[1]
    flat = traverse_util.flatten_dict(places, sep="/")
    tables = [name for name in ("token_embedding", "lm_head") if name in flat]
    # The old number of rows may not divide over the devices: they are read whole, and placed once there are more.
    whole = flat | {name: replicated(flat[name].mesh) for name in tables}
    params = hub.load(folder, shardings=traverse_util.unflatten_dict(whole, sep="/"), only=only)[1]
    for name in [table for table in tables if table in params]:
        grown = with_rows(np.asarray(params[name].addressable_data(0)), config.vocab_size)
        params[name] = jax.make_array_from_callback(grown.shape, flat[name], lambda part, x=grown: x[part])
    return params


def with_rows(table: Float[np.ndarray, "rows width"], rows: int) -> Float[np.ndarray, "more width"]:
    """A table with more rows, each the mean of those there were: a new token is no likelier than any other.

    On the host: where it is frozen a checkpoint has its digest alone, and no two kinds of devices add up alike.
    """
    mean = table.astype(np.float64).mean(axis=0).astype(table.dtype)
    return np.concatenate([table, np.broadcast_to(mean, (rows - len(table), table.shape[1]))])


def to_json(config: VlmConfig) -> dict[str, Any]:
    """A model config as json, for `workdir/model.json`."""
    return {"kind": "vlm", **dataclasses.asdict(config)}


def from_json(value: Mapping[str, Any]) -> Vlm:
    """Inverse of `to_json`, as a module."""
    image, words = dict(value["image"]), dict(value["text"])
    if isinstance(image["image_size"], list):
        image["image_size"] = tuple(image["image_size"])
    words["rope"] = None if words["rope"] is None else Rope(**words["rope"])
    words["eos_token_ids"] = tuple(words["eos_token_ids"])
    bridge, qformer = dict(value["bridge"]), value["bridge"].get("qformer")
    if qformer is not None:
        bridge["qformer"] = QformerConfig(**{**qformer, "bert": BertConfig(**qformer["bert"])})
    return Vlm(
        VlmConfig(
            image=VitConfig(**image),
            text=DecoderConfig(**words),
            bridge=BridgeConfig(**bridge),
            image_token_id=value["image_token_id"],
            feature_layers=tuple(value["feature_layers"]),
            keep_class=value["keep_class"],
        )
    )
