"""CLIP's causal text transformer, pooled at the end-of-text token."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError
from vlmjax.models.layers import (
    DTYPES,
    BlockInit,
    Ids,
    LayerNorm,
    Mlp,
    PositionIds,
    SelfAttention,
    check_length,
    check_tower,
    lookup,
    stack,
    stream,
)
from vlmjax.models.outputs import TowerOutput
from vlmjax.ops.attention import causal_mask, combine_masks, padding_mask
from vlmjax.sharding.activations import constrain


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Shape of CLIP's text transformer. Special ids are the tokenizer's; pooling follows `eos_token_id`."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    vocab_size: int
    max_length: int = 77
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    pad_token_id: int = 49407
    bos_token_id: int = 49406
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_tower(self)
        if self.vocab_size < 1 or self.max_length < 1:
            raise RecipeError(
                f"TextConfig has vocab_size {self.vocab_size} and max_length {self.max_length}; "
                "both must be positive"
            )


def text_init(width: int, depth: int) -> BlockInit:
    """Initialisers of the text blocks (openai/CLIP, clip/model.py: initialize_parameters).

    Normal with std width^-0.5 for q, k, v; (2 width)^-0.5 for fc1; width^-0.5 (2 depth)^-0.5 for the two
    kernels that write into the stream, so its variance does not grow with depth.
    """
    normal = nn.initializers.normal
    writing = normal(width**-0.5 * (2 * depth) ** -0.5)
    return BlockInit(normal(width**-0.5), writing, normal((2 * width) ** -0.5), writing)


class TextBlock(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "#batch 1 tokens tokens"]
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Return the stream after this block, and nothing else for the scan to collect."""
        cfg, dtype = self.config, DTYPES[self.config.dtype]
        init = text_init(cfg.width, cfg.depth)
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm1")(x)
        x = stream(x + SelfAttention(cfg.heads, dtype, init, name="self_attn")(y, mask))
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm2")(x)
        return stream(x + Mlp(cfg.mlp_dim, cfg.activation, dtype, init, name="mlp")(y)), None


class TextEmbeddings(nn.Module):
    """Token and position embeddings, added."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, input_ids: Ids, position_ids: PositionIds | None
    ) -> Float[Array, "batch tokens width"]:
        """Look up; positions count from zero unless given."""
        cfg = self.config
        # Stds of openai/CLIP's initialize_parameters.
        tokens = self.param(
            "token_embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.width), jnp.float32
        )
        table = self.param(
            "position_embedding", nn.initializers.normal(0.01), (cfg.max_length, cfg.width), jnp.float32
        )
        positions = table[None, : input_ids.shape[1]] if position_ids is None else lookup(table, position_ids)
        return stream((lookup(tokens, input_ids) + positions).astype(DTYPES[cfg.dtype]))


class TextEncoder(nn.Module):
    """The blocks, scanned."""

    config: TextConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "#batch 1 tokens tokens"]
    ) -> Float[Array, "batch tokens width"]:
        """Run all layers."""
        blocks = stack(TextBlock, self.config.depth, self.config.remat)
        return blocks(self.config, name="layers")(x, mask)[0]


class Text(nn.Module):
    """CLIP's text tower. Its pooled output is the normalised end-of-text token, in float32."""

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        position_ids: PositionIds | None = None,
        *,
        train: bool = False,
    ) -> TowerOutput:
        """Encode token ids; a token sees itself and earlier tokens that `attention_mask` keeps.

        `train` changes nothing here (the tower has no dropout); all towers take it. Raises UserError for more
        tokens than config.max_length.
        """
        del train
        cfg = self.config
        check_length(input_ids, cfg.max_length)
        tokens = input_ids.shape[1]
        padding = None if attention_mask is None else padding_mask(jnp.asarray(attention_mask))
        x = TextEmbeddings(cfg, name="embeddings")(input_ids, position_ids)
        x = TextEncoder(cfg, name="encoder")(x, combine_masks(causal_mask(tokens, tokens), padding))
        # Pooled before normalising: training wants nothing else, and the compiler then drops the large norm.
        row = jnp.take_along_axis(
            x, eos_position(jnp.asarray(input_ids), cfg.eos_token_id)[:, None, None], axis=1
        )
        norm = LayerNorm(cfg.layer_norm_eps, jnp.float32, name="final_layer_norm")
        pooled = constrain(norm(row[:, 0]), "batch", None)
        return TowerOutput(last_hidden_state=norm(x).astype(x.dtype), pooler_output=pooled)


def eos_position(input_ids: Int[Array, "batch tokens"], eos_token_id: int) -> Int[Array, " batch"]:
    """Where the end-of-text token of each row is, by Hugging Face's rule (transformers PR #24773).

    The first position holding `eos_token_id`, or 0 where none does. Configs written before that change say 2,
    which is no end-of-text id of CLIP's; for them it is the first position of the largest id in the row.
    """
    if eos_token_id == 2:
        return input_ids.argmax(axis=-1)
    return (input_ids == eos_token_id).argmax(axis=-1)
