"""How a BLIP begins: pretraining with a ViT and a BERT, fine-tuning with the parameters of pretraining.

Functions on trees of parameters. Nothing is left out in silence: what another model has to give and has not is an
error, and only what is new in a form keeps its fresh values.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vlmjax.errors import UserError
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa, twin_layers
from vlmjax.models.med import DECODER, ENCODER
from vlmjax.models.vit import VitConfig
from vlmjax.ops.resize import resize_positions

Params = Mapping[str, Any]
POSITIONS = "vision_model/embeddings/position_embedding"
# What fine-tuning adds: everything else comes from pretraining.
_NEW = re.compile(r"cls_(dense|out)/.*|.*/merge_layer/.*")
# What reads a question where pretraining reads an image: new where the two differ in width, as in BLIP's own code.
_NEW_WIDTH = re.compile(r"text_decoder/.*/crossattention/self/(key|value)/kernel")


def from_pretraining(
    model: nn.Module, fresh: Params, source: nn.Module, source_params: Params
) -> dict[str, Any]:
    """Parameters of any form of BLIP, begun with those of another.

    A BlipCaptioner and a BlipRetriever take their half of a Blip. Both ends of a BlipVqa take the one text transformer,
    both branches of a BlipNlvr's cross-attention the one that there is. Positions of images are resized where the
    image size differs (224 in pretraining, 384 or 480 after it). What a form adds keeps its fresh values: the head and
    the merging projections of a BlipNlvr, and in a BlipVqa whose tower is wider than its text the projections of what
    the answer decoder looks at.

    Args:
      model: the form to begin.
      fresh: its parameters as `init` gives them, or their shapes (`jax.eval_shape`) for a form that adds none.
      source: the other model, a Blip for most, or one of the same form.
      source_params: its parameters.

    Raises:
      UserError: parameters that the source has not, or has in another shape; all are named.
    """
    found = flatten_dict(dict(source_params), sep="/")
    start, problems = {}, []
    again = type(source) is type(model)
    other = isinstance(model, BlipVqa) and model.config.text.width != model.config.image.width
    for path, leaf in flatten_dict(dict(fresh), sep="/").items():
        there, layers = (path, None) if again else _source(model, path)
        if not again and (_NEW.fullmatch(path) or (other and _NEW_WIDTH.fullmatch(path))):
            start[path] = leaf
            continue
        if there not in found:
            problems.append(f"{there} is not there")
            continue
        value = found[there] if layers is None else found[there][layers]
        if path == POSITIONS:
            value = resize_positions(jnp.asarray(value), source.config.image.grid, model.config.image.grid)
        if value.shape != leaf.shape:
            problems.append(f"{there} is {list(value.shape)}, expected {list(leaf.shape)}")
        start[path] = value
    _refuse(type(model).__name__, type(source).__name__, problems)
    return unflatten_dict(start, sep="/")


def _source(model: nn.Module, path: str) -> tuple[str, slice | None]:
    """Where a parameter comes from, and which of the layers there."""
    there = re.sub(r"^text_(encoder|decoder)/", "text_model/", path)
    if not isinstance(model, BlipNlvr):
        return there, None
    there = re.sub(r"crossattention/self[01]/", "crossattention/self/", there)
    there = re.sub(r"crossattention/output/dense[01]/", "crossattention/output/dense/", there)
    for name, (first, end) in twin_layers(model.config.text.depth).items():
        if there.startswith(f"text_model/{name}/"):
            return there.replace(f"text_model/{name}/", "text_model/encoder/layer/"), slice(first, end)
    return there, None


def from_towers(
    model: nn.Module,
    fresh: Params,
    *,
    image: tuple[VitConfig, Params] | None = None,
    text: tuple[BertConfig, Params] | None = None,
    head: Params | None = None,
    fold_token_type: bool = False,
) -> dict[str, Any]:
    """Parameters for pretraining, begun with those of a ViT and of a BERT.

    BLIP takes ViT-B/16 of DeiT or ViT-L/16 of AugReg, and BERT-base (2201.12086, section 4.1). Self-attention of
    encoder and decoder both begin as BERT's; cross-attention and the rows of [DEC] and [ENC] stay fresh.

    Args:
      model: a Blip, BlipCaptioner or BlipRetriever.
      fresh: its parameters as `init` gives them.
      image: configuration and parameters of a ClipVision, as `hub.load` gives it of a ViTModel; None: fresh.
      text: of a Bert, as `hub.load` gives it of a BertModel; None: fresh.
      head: of a BERT that fills in masked words, as `hub.bert_head.load_head` reads it; the decoder begins with it.
      fold_token_type: add BERT's first token type to its positions, so that texts are encoded exactly as BERT does.
        BLIP drops it.

    Raises:
      UserError: a tower of another shape.
    """
    start, given = flatten_dict(dict(fresh), sep="/"), {}
    if image is not None:
        config, params = image
        for path, value in flatten_dict(dict(params), sep="/").items():
            if path == POSITIONS:
                value = resize_positions(jnp.asarray(value), config.grid, model.config.image.grid)
            if path.startswith("vision_model/"):
                given[path] = value
    if text is not None:
        given |= _of_bert(text[1], start, fold_token_type)
    if head is not None:
        for path, value in flatten_dict({"text_model": {"head": dict(head)}}, sep="/").items():
            given[path] = grown(value, start.get(path)) if path.endswith("head/bias") else value
    return laid_over(type(model).__name__, start, given)


def laid_over(model: str, start: Params, given: Params, problems: Sequence[str] = ()) -> dict[str, Any]:
    """A tree of the parameters `start` of a model, with those that towers give in their places; both by path.

    Raises UserError naming `problems` and all that have no place or another shape.
    """
    problems = list(problems)
    for path, value in given.items():
        if path not in start:
            problems.append(f"{path} has no place")
        elif value.shape != start[path].shape:
            problems.append(f"{path} is {list(value.shape)}, expected {list(start[path].shape)}")
    _refuse(model, "the towers", problems)
    return unflatten_dict({**start, **given}, sep="/")


def _of_bert(bert: Params, start: Mapping[str, Any], fold_token_type: bool) -> dict[str, Any]:
    """BERT's parameters under the names of a Med."""
    flat = {path: value for path, value in flatten_dict(dict(bert), sep="/").items() if "pooler" not in path}
    types = flat.pop("embeddings/token_type_embeddings")
    if fold_token_type:
        flat["embeddings/position_embeddings"] = flat["embeddings/position_embeddings"] + types[:1]
    flat = {f"text_model/{path}": value for path, value in flat.items()}
    layer = "text_model/encoder/layer/"
    own = {path: flat.pop(path) for path in list(flat) if path.startswith(f"{layer}{ENCODER}/")}
    for name in (ENCODER, DECODER):
        if any(path.startswith(f"{layer}{name}/") for path in start):
            flat |= {path.replace(ENCODER, name, 1): value for path, value in own.items()}
    for name in ("word_embeddings", "position_embeddings"):
        path = f"text_model/embeddings/{name}"
        flat[path] = grown(flat[path], start.get(path))
    return flat


def grown(known: Any, table: Any) -> Any:
    """A table with the rows that are known in front, as far as it reaches."""
    if table is None or known.shape[1:] != table.shape[1:]:
        return known
    rows = min(known.shape[0], table.shape[0])
    return jnp.asarray(table).at[:rows].set(jnp.asarray(known)[:rows].astype(table.dtype))


def resize_images(
    model: nn.Module, params: Params, image_size: int | tuple[int, int]
) -> tuple[nn.Module, dict[str, Any]]:
    """The same form of BLIP for images of another size, 384 for one: positions are resized, all else is as it was."""
    config = dataclasses.replace(model.config.image, image_size=image_size)
    flat = flatten_dict(dict(params), sep="/")
    flat[POSITIONS] = resize_positions(jnp.asarray(flat[POSITIONS]), model.config.image.grid, config.grid)
    return model.clone(config=dataclasses.replace(model.config, image=config)), unflatten_dict(flat, sep="/")


def _refuse(model: str, source: str, problems: list[str]) -> None:
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{model} cannot begin with {source}: {'; '.join(problems[:8])}{more}")


def momentum_part(params: Params) -> dict[str, Any]:
    """The parameters of which ITC keeps a moving average: tower, text encoder without a look at images, projections.

    `Blip.apply({"params": part}, ..., method="encode_image")` and `encode_text`, `embed_image`, `embed_text` need no
    others.
    """
    wanted = re.compile(
        rf"vision_model/.*|text_model/embeddings/.*|text_model/encoder/layer/({ENCODER}|intermediate|output)/.*"
        "|(vision|text)_proj/.*"
    )
    flat = flatten_dict(dict(params), sep="/")
    return unflatten_dict({path: x for path, x in flat.items() if wanted.fullmatch(path)}, sep="/")
