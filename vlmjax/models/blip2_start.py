"""How BLIP-2's first stage begins: a frozen image tower without its last block, a Q-Former with BERT's parameters.

Functions on trees of parameters. What a tower gives and the model has no place for is an error, as in
models/blip_start.py; all that stays behind is said below.
"""

import re
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vlmjax.models.bert import BertConfig
from vlmjax.models.blip2 import Blip2, Blip2Retriever
from vlmjax.models.blip_start import POSITIONS, Params, grown, laid_over
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig
from vlmjax.ops.resize import resize_positions

_BLOCKS = "vision_model/encoder/layers/"
_FEED_FORWARD = re.compile(r"^(intermediate|output)/(.*)")


def from_towers(
    model: Blip2Retriever,
    fresh: Params,
    *,
    image: tuple[VitConfig, Params] | None = None,
    text: tuple[BertConfig, Params] | None = None,
    head: Params | None = None,
    fold_token_type: bool = False,
) -> dict[str, Any]:
    """Parameters for the first stage, begun with those of an image tower and of a BERT (2301.12597, section 3.1).

    Queries' feed-forwards begin as the text's; cross-attention, the queries, the norm between tower and Q-Former, and
    the row of [DEC] stay fresh. Of a tower with more blocks than the model's the first are taken, and a norm after its
    blocks is left behind; so are BERT's pooler and token types.

    Args:
      model: a Blip2 or Blip2Retriever.
      fresh: its parameters as `init` gives them.
      image: configuration and parameters of a ClipVision, as `hub.load` gives them of CLIP or `hub.lavis_blip2` of EVA;
        None: fresh.
      text: of a Bert, as `hub.load` gives them of a BertModel; None: fresh.
      head: of a BERT that fills in masked words, as `hub.bert_head.load_head` reads it; writing begins with it.
      fold_token_type: add BERT's first token type to its positions, so that texts are encoded exactly as BERT does.

    Raises:
      UserError: a tower or a BERT of another shape.
    """
    start, given = flatten_dict(dict(fresh), sep="/"), {}
    problems: list[str] = []
    if image is not None:
        given |= of_tower(model.config.image, *image)
    if text is not None:
        depth, wanted = text[0].depth, model.config.text.depth
        if depth != wanted:
            problems.append(f"a BERT of {depth} layers, expected {wanted}")
        given |= _of_bert(model.config.qformer, text[1], start, fold_token_type)
    if head is not None and isinstance(model, Blip2):
        for path, value in flatten_dict({"head": dict(head)}, sep="/").items():
            given[path] = grown(value, start[path]) if path == "head/bias" else value
    return laid_over(type(model).__name__, start, given, problems)


def of_tower(config: VitConfig, source: VitConfig, params: Params) -> dict[str, Any]:
    """Parameters of a tower as those of one of shape `config`, which has its first blocks; {"vision_model/...": leaf}.

    Positions are resized to the grid of `config`.
    """
    found = {}
    for path, value in flatten_dict(dict(params), sep="/").items():
        if not path.startswith("vision_model/") or path.startswith("vision_model/post_layernorm/"):
            continue
        if path == POSITIONS:
            value = resize_positions(
                jnp.asarray(value), source.grid, config.grid, prefix=int(config.class_token)
            )
        found[path] = value[: config.depth] if path.startswith(_BLOCKS) else value
    return found


def _of_bert(
    config: QformerConfig, bert: Params, start: dict[str, Any], fold_token_type: bool
) -> dict[str, Any]:
    """BERT's parameters under the names of a Q-Former."""
    flat = {path: value for path, value in flatten_dict(dict(bert), sep="/").items() if "pooler" not in path}
    types = flat.pop("embeddings/token_type_embeddings")
    if fold_token_type:
        flat["embeddings/position_embeddings"] = flat["embeddings/position_embeddings"] + types[:1]
    every, found = config.cross_attention_frequency, {}
    groups, rest = divmod(config.bert.depth, every)
    for path, value in flat.items():
        layer = path.removeprefix("encoder/layer/")
        if layer == path:
            path = f"qformer/{path}"
            found[path] = grown(value, start.get(path)) if path.endswith("_embeddings") else value
            continue
        # A text's feed-forward, and the same for the queries.
        for name in {layer, _FEED_FORWARD.sub(r"\1_query/\2", layer)}:
            for place in range(every):
                if groups:
                    found[f"qformer/groups/layer_{place}/{name}"] = value[place : groups * every : every]
                if place < rest:
                    found[f"qformer/rest/layer_{place}/{name}"] = value[groups * every + place]
    return found
