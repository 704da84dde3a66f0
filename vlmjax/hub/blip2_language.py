"""Blip2ForConditionalGeneration: BLIP-2 after its second stage, with OPT, T5 or any decoder we write.

MiniGPT-4 with a Q-Former is one too, around Vicuna. Source of names and defaults: transformers,
models/blip_2/{modeling_blip_2,configuration_blip_2}.py. Texts have a placeholder for each query, wherever an image
stands. What the class cannot express, or computes otherwise, is refused with the reason.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlmjax.errors import HubError
from vlmjax.hub import blip2, llama, opt, t5
from vlmjax.hub.blip import vision_rows
from vlmjax.hub.family import Family, nearest, only
from vlmjax.hub.table import Names, Row, linear
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.t5_layers import T5Config
from vlmjax.models.vlm import Seeing, VlmConfig, example_inputs, vlm_of


class _Words(NamedTuple):
    """A class of language models: its configuration in both directions, its table, copies of a tied embedding."""

    to_ours: Callable[[Mapping[str, Any], str], Any]
    to_theirs: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], list[Row]]
    copies: Callable[[Any], Mapping[str, str]]


def _head(table: str) -> Callable[[DecoderConfig], Mapping[str, str]]:
    return lambda config: {"lm_head.weight": table} if config.tied else {}


_TABLE = "model.embed_tokens.weight"
LANGUAGES = {
    "opt": _Words(opt.to_opt, opt.from_opt, opt.opt_rows, _head("model.decoder.embed_tokens.weight")),
    "t5": _Words(t5.to_t5, t5.from_t5, t5.t5_rows, t5.copies),
    "llama": _Words(llama.to_llama, llama.from_llama, llama.decoder_rows, _head(_TABLE)),
    "mistral": _Words(llama.to_mistral, llama.from_mistral, llama.decoder_rows, _head(_TABLE)),
    "qwen2": _Words(llama.to_qwen2, llama.from_qwen2, llama.decoder_rows, _head(_TABLE)),
}
_NARROW = (
    "{where} has an embedding of width {inner} in a model of width {width} (OPT-350m): Blip2ForConditionalGeneration "
    "puts queries of the one width in place of words of the other, and so mixes the rows of a batch. Take another "
    "language model"
)


# ---- configurations


def _name_of(config: DecoderConfig | T5Config) -> str:
    return "t5" if isinstance(config, T5Config) else config.family


def to_generation(config: Mapping[str, Any]) -> VlmConfig:
    """Blip2Config of transformers -> VlmConfig."""
    c = blip2.DEFAULTS | config
    words = {"model_type": "opt", **(c.get("text_config") or {})}
    if words["model_type"] not in LANGUAGES:
        raise HubError(
            f"text_config.model_type is {words['model_type']!r}; {nearest(words['model_type'], LANGUAGES)}"
        )
    text = LANGUAGES[words["model_type"]].to_ours(words, "text_config")
    if getattr(text, "embed_dim", None) is not None:
        raise HubError(_NARROW.format(where="text_config", inner=text.embed_dim, width=text.width))
    if c["image_token_index"] is None:
        raise HubError(
            "image_token_index is missing: this folder is from before images had placeholders. Add a row for an image "
            "token to the embedding with transformers (resize_token_embeddings), set image_token_index to its id and "
            "save it again"
        )
    qformer = blip2.to_qformer(c.get("qformer_config") or {}, c["num_query_tokens"])
    if qformer.reads_text:
        raise HubError(
            "qformer_config.use_qformer_text_input is True, but Blip2ForConditionalGeneration gives its Q-Former no "
            "text; set it to false if the file has no tensors for it"
        )
    image = blip2.to_image(c.get("vision_config") or {})
    epsilon = blip2.to_epsilon(c, image)
    return VlmConfig(
        image=image,
        text=text,
        bridge=BridgeConfig("qformer", qformer=qformer, norm_eps=epsilon),
        image_token_id=c["image_token_index"],
        feature_layers=(-1,),
        keep_class=True,
    )


def from_generation(config: VlmConfig) -> dict[str, Any]:
    """VlmConfig -> Blip2Config of transformers."""
    cls, bridge, name = "Blip2ForConditionalGeneration", config.bridge, _name_of(config.text)
    only(config, cls, feature_layers=(-1,), keep_class=True)
    only(bridge, cls, kind="qformer", bias=True)
    if getattr(config.text, "embed_dim", None) is not None:
        raise HubError(
            _NARROW.format(where="the model", inner=config.text.embed_dim, width=config.text.width)
        )
    return blip2.DEFAULTS | {
        "model_type": "blip-2",
        "vision_config": blip2.from_image(config.image),
        "qformer_config": blip2.from_qformer(bridge.qformer, config.image.width),
        "text_config": LANGUAGES[name].to_theirs(config.text),
        "num_query_tokens": bridge.qformer.queries,
        "image_token_index": config.image_token_id,
        "use_decoder_only_language_model": name != "t5",
        "is_encoder_decoder": name == "t5",
        **blip2.from_epsilon(bridge.norm_eps, config.image),
    }


# ---- table


def generation_rows(config: VlmConfig) -> list[Row]:
    """Rows of the parts."""
    rows = vision_rows(config.image, "bridge/ln_vision")
    rows += [row.under("", "bridge/") for row in blip2.qformer_rows(config.bridge.qformer)]
    rows += linear("language_projection", "bridge/linear_1")
    words = LANGUAGES[_name_of(config.text)].rows(config.text)
    return rows + [row.under("language_model.", "language_model/") for row in words]


def _copies(model: Seeing) -> dict[str, str]:
    words = model.config.text
    pairs = LANGUAGES[_name_of(words)].copies(words)
    return {f"language_model.{copy}": f"language_model.{original}" for copy, original in pairs.items()}


GENERATION = Family(
    architecture="Blip2ForConditionalGeneration",
    to_model=lambda config: vlm_of(to_generation(config)),
    to_config=lambda m: from_generation(m.config),
    rows=lambda m: generation_rows(m.config),
    names=Names(
        ignored=(
            *(rf"language_model\.{name}" for name in t5.UNREAD),
            r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        )
    ),
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor="Blip2Processor",
    copies=_copies,
)
