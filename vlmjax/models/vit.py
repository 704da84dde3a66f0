"""Vision transformers of CLIP, SigLIP and BLIP: patches, with a class token or without, through pre-norm blocks."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.layers import (
    DTYPES,
    BlockInit,
    LayerNorm,
    Mlp,
    SelfAttention,
    check_tower,
    heads_of,
    stack,
    stream,
)
from vlmjax.models.outputs import TowerOutput, VisionOutput
from vlmjax.ops.attention import attention, merge_heads
from vlmjax.ops.resize import resize_positions
from vlmjax.sharding.activations import constrain

POOLS = ("class", "attention", "none")
INITS = ("clip", "normal")


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Shape of a vision transformer. `image_size` is a side or (height, width) in pixels.

    The last six fields are CLIP's by default; SigLIP (2303.15343) has neither class token nor norm before the blocks,
    a bias on its patches, and pools with a query of its own (2106.04560, section 3). `blip_vit` gives BLIP's, and
    `blip2_vit` BLIP-2's.

    Attributes:
      drop_path: chance that a sub-layer of the last block adds nothing to an image in training; blocks before it have
        less, the first one none (stochastic depth, 1603.09382).
      class_token: whether a learned token stands before the patches.
      pre_norm: whether a norm stands before the blocks.
      post_norm: whether one stands after them.
      patch_bias: whether the projection of patches has a bias.
      pool: `class` (the normalised class token), `attention`, or `none`.
      init: of the kernels, `clip` as in CLIP's release, or `normal` with std 0.02 (BERT's, timm's).
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int
    image_size: int | tuple[int, int]
    patch_size: int
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"
    patch_dropout: float = 0.0
    drop_path: float = 0.0
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    pool: str = "class"
    init: str = "clip"
    post_norm: bool = True

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_tower(self)
        if self.pool not in POOLS or (self.pool == "class" and not self.class_token):
            raise RecipeError(
                f"VitConfig.pool is {self.pool!r} with class_token={self.class_token}; choose one of "
                f"{', '.join(POOLS)}, and `class` only where there is one"
            )
        if self.pool == "class" and not self.post_norm:
            raise RecipeError(
                "VitConfig.pool 'class' is of a normalised token; leave post_norm, or take 'none'"
            )
        if min(self.grid) < 1:
            raise RecipeError(
                f"VitConfig.patch_size {self.patch_size} leaves no patch in image_size {self.image_size}; "
                "choose a smaller patch or a larger image"
            )
        if self.init not in INITS:
            raise RecipeError(f"VitConfig.init is {self.init!r}; choose one of {', '.join(INITS)}")
        for field in ("patch_dropout", "drop_path"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise RecipeError(
                    f"VitConfig.{field} is {getattr(self, field)}; give a share from 0 to below 1"
                )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of whole patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def kept_patches(self) -> int:
        """Patches that a training step keeps of each image at the configured size."""
        return max(1, round(math.prod(self.grid) * (1.0 - self.patch_dropout)))


def vit_init(config: VitConfig) -> BlockInit:
    """Initialisers of the image blocks, as OpenAI's release leaves them (openai/CLIP, clip/model.py).

    `initialize_parameters` there touches only the text blocks, so the image blocks keep PyTorch's defaults:
    q, k, v jointly Xavier-uniform over a [3 width, width] matrix (std (2 width)^-0.5), every other kernel
    uniform within fan_in^-0.5 (std (3 fan_in)^-0.5).
    With `init` "normal" all are what timm's trunc_normal_ draws: it cuts at +-2, which is 100 times its std of 0.02.
    """
    if config.init == "normal":
        return BlockInit(*[nn.initializers.normal(0.02)] * 4)
    linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return BlockInit(nn.initializers.variance_scaling(1 / 2, "fan_in", "uniform"), linear, linear, linear)


class VitBlock(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    config: VitConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], drop: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Return the stream after this block, and nothing else for the scan to collect.

        `drop` is the chance of either sub-layer to add nothing to an image; None: there is none.
        """
        cfg, dtype, init = self.config, DTYPES[self.config.dtype], vit_init(self.config)
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm1")(x)
        y = SelfAttention(cfg.heads, dtype, init, name="self_attn")(y)
        x = stream(x + (y if drop is None else drop_path(y, drop, self.make_rng("dropout"))))
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm2")(x)
        y = Mlp(cfg.mlp_dim, cfg.activation, dtype, init, name="mlp")(y)
        return stream(x + (y if drop is None else drop_path(y, drop, self.make_rng("dropout")))), None


class VitKeepingBlock(VitBlock):
    """The same block, whose output the scan also collects."""

    def __call__(
        self, x: Float[Array, "batch tokens width"], drop: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch tokens width"]]:
        """Return the stream after this block, twice."""
        x, _ = super().__call__(x, drop)
        return x, x


class VitEmbeddings(nn.Module):
    """Pixels to tokens: one per patch, after a class token if there is one, plus learned positions."""

    config: VitConfig

    @nn.compact
    def __call__(
        self, pixel_values: Float[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch tokens model_width"]:
        """Embed; positions are resampled where the image has another grid than the config's."""
        cfg, dtype = self.config, DTYPES[self.config.dtype]
        pixels = jnp.asarray(pixel_values).astype(dtype)
        patches, grid = patchify(pixels, cfg.patch_size)
        # As in openai/CLIP: class token and positions normal with std width^-0.5, the patch kernel at the
        # default of torch's Conv2d, uniform within fan_in^-0.5.
        normal = nn.initializers.normal(0.02 if cfg.init == "normal" else cfg.width**-0.5)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        rows = cfg.class_token + math.prod(cfg.grid)
        positions = self.param("position_embedding", normal, (rows, cfg.width), jnp.float32)
        tokens = nn.Dense(
            cfg.width, use_bias=cfg.patch_bias, dtype=dtype, kernel_init=uniform, name="patch_embedding"
        )(patches)
        if cfg.class_token:
            class_embedding = self.param("class_embedding", normal, (cfg.width,), jnp.float32)
            first = jnp.broadcast_to(class_embedding.astype(dtype), (tokens.shape[0], 1, cfg.width))
            tokens = jnp.concatenate([first, tokens], axis=1)
        positions = resize_positions(positions, cfg.grid, grid, prefix=int(cfg.class_token)).astype(dtype)
        return stream(tokens + positions[None])


class VitEncoder(nn.Module):
    """The blocks, scanned."""

    config: VitConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], layers: tuple[int, ...] = (), train: bool = False
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch tokens features"] | None]:
        """Run all layers; returns what the last one leaves, and the chosen hidden states side by side."""
        cfg = self.config
        drops = jnp.linspace(0.0, cfg.drop_path, cfg.depth, dtype=jnp.float32)
        block = stack(VitKeepingBlock if layers else VitBlock, cfg.depth, cfg.remat, dealt=True)
        last, each = block(cfg, name="layers")(x, drops if train and cfg.drop_path > 0.0 else None)
        if not layers:
            return last, None
        chosen = [layer % (cfg.depth + 1) for layer in layers]
        return last, jnp.concatenate([each[layer - 1] if layer else x for layer in chosen], axis=-1)


class Vit(nn.Module):
    """An image tower. Its pooled output is in float32."""

    config: VitConfig

    @nn.compact
    def __call__(
        self,
        pixel_values: Float[Array | np.ndarray, "batch height width channels"],
        *,
        train: bool = False,
        layers: tuple[int, ...] = (),
    ) -> TowerOutput:
        """Encode normalised images, channels last, of any size of at least one patch.

        With `train` and config.patch_dropout, a random share of the patches is left out, so there are fewer tokens;
        that and config.drop_path need the "dropout" rng. With `pool` "class" last_hidden_state is not normalised, else
        it is, as in Hugging Face's models, unless there is no `post_norm`. `layers` chooses hidden states for
        `features`: 0 is what the first block reads, -1 what the last one leaves.
        """
        cfg, dtype = self.config, DTYPES[self.config.dtype]
        check_pixels(pixel_values, cfg.patch_size)
        x = VitEmbeddings(cfg, name="embeddings")(pixel_values)
        if train and cfg.patch_dropout > 0.0:
            x = drop_patches(x, cfg.patch_dropout, self.make_rng("dropout"), kept=int(cfg.class_token))
        if cfg.pre_norm:
            x = LayerNorm(cfg.layer_norm_eps, dtype, name="pre_layernorm")(x)
        x, features = VitEncoder(cfg, name="encoder")(x, layers, train)
        if cfg.pool == "class":
            pooled = LayerNorm(cfg.layer_norm_eps, jnp.float32, name="post_layernorm")(x[:, 0])
        else:
            x = LayerNorm(cfg.layer_norm_eps, dtype, name="post_layernorm")(x) if cfg.post_norm else x
            pooled = AttentionPool(cfg, name="head")(x) if cfg.pool == "attention" else None
        pooled = None if pooled is None else constrain(pooled, "batch", None)
        return TowerOutput(last_hidden_state=x, pooler_output=pooled, features=features)


class AttentionPool(nn.Module):
    """One learned query looks at all tokens, then an MLP adds to what it saw (2106.04560, section 3)."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        """Pool, in float32."""
        cfg, init = self.config, vit_init(self.config)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, cfg.width), jnp.float32)
        kernel = self.param("in_proj", init.qkv, (cfg.width, 3 * cfg.width), jnp.float32)
        bias = self.param("in_proj_bias", nn.initializers.zeros_init(), (3 * cfg.width,), jnp.float32)
        x = x.astype(jnp.float32)
        query = jnp.broadcast_to(probe, (x.shape[0], 1, cfg.width))
        parts = zip((query, x, x), jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        q, k, v = (heads_of(inputs @ part + shift[None, None], cfg.heads) for inputs, part, shift in parts)
        mixed = merge_heads(attention(q, k, v))
        mixed = nn.Dense(cfg.width, kernel_init=init.out, name="out_proj")(mixed)
        y = LayerNorm(cfg.layer_norm_eps, jnp.float32, name="layernorm")(mixed)
        return (mixed + Mlp(cfg.mlp_dim, cfg.activation, jnp.float32, init, name="mlp")(y))[:, 0]


def class_state(out: TowerOutput | VisionOutput) -> Float[Array, "batch width"]:
    """The float32 state that stands for an image: what its tower pools, else its class token's, normalised like all."""
    pooled = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
    return pooled.astype(jnp.float32)


def check_pixels(pixel_values: Array | np.ndarray, patch_size: int) -> None:
    """Raise UserError unless the images are floating, channels last and hold at least one patch."""
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[-1] != 3:
        raise UserError(f"pixel_values has shape {shape}; expected [batch, height, width, 3] (channels last)")
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise UserError(f"pixel_values is {pixel_values.dtype}; normalise it first: (x / 255 - mean) / std")
    if min(shape[1:3]) < patch_size:
        raise UserError(
            f"pixel_values of {shape[1]}x{shape[2]} pixels hold no patch of {patch_size}; enlarge them"
        )


def patchify(
    pixels: Float[Array, "batch height width channels"], patch: int
) -> tuple[Float[Array, "batch patches values"], tuple[int, int]]:
    """Cut images into flat square patches, row by row, and return them with the grid (rows, columns).

    Values run over patch rows, patch columns, channels. Pixels right of or below the last whole patch are
    dropped, as a convolution with stride `patch` drops them. Together with a matrix product this is that
    convolution, but in a form every backend runs at matrix speed.
    """
    batch, height, width, channels = pixels.shape
    rows, columns = height // patch, width // patch
    pixels = pixels[:, : rows * patch, : columns * patch]
    cut = pixels.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, rows * columns, patch * patch * channels), (rows, columns)


def drop_patches(
    x: Float[Array, "batch tokens width"], share: float, key: jax.Array, kept: int = 1
) -> Float[Array, "batch fewer width"]:
    """Keep the first `kept` tokens and a random part of the patches, drawn per image (FLIP, arXiv:2212.00794)."""
    patches = x.shape[1] - kept
    keep = max(1, round(patches * (1.0 - share)))
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (x.shape[0], patches)), keep)
    rest = jnp.take_along_axis(x[:, kept:], chosen[:, :, None], axis=1)
    return jnp.concatenate([x[:, :kept], rest], axis=1) if kept else rest


def drop_path(
    x: Float[Array, "batch tokens width"], chance: Float[Array, ""], key: jax.Array
) -> Float[Array, "batch tokens width"]:
    """Zeros for a random part of the images, and the others so much larger that the expectation stays."""
    stay = 1.0 - chance
    stays = jax.random.bernoulli(key, stay, (x.shape[0], 1, 1))
    return jnp.where(stays, x / stay.astype(x.dtype), jnp.zeros((), x.dtype))
