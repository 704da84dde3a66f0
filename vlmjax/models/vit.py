"""CLIP's vision transformer: patches and a class token through pre-norm blocks."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.layers import DTYPES, BlockInit, LayerNorm, Mlp, SelfAttention, check_tower, stack, stream
from vlmjax.models.outputs import TowerOutput
from vlmjax.ops.resize import resize_positions
from vlmjax.sharding.activations import constrain


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Shape of a vision transformer. `image_size` is a side or (height, width) in pixels."""

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

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_tower(self)
        if min(self.grid) < 1:
            raise RecipeError(
                f"VitConfig.patch_size {self.patch_size} leaves no patch in image_size {self.image_size}; "
                "choose a smaller patch or a larger image"
            )
        if not 0.0 <= self.patch_dropout < 1.0:
            raise RecipeError(
                f"VitConfig.patch_dropout is {self.patch_dropout}; give a share from 0 to below 1"
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


def vit_init(width: int) -> BlockInit:
    """Initialisers of the image blocks, as OpenAI's release leaves them (openai/CLIP, clip/model.py).

    `initialize_parameters` there touches only the text blocks, so the image blocks keep PyTorch's defaults:
    q, k, v jointly Xavier-uniform over a [3 width, width] matrix (std (2 width)^-0.5), every other kernel
    uniform within fan_in^-0.5 (std (3 fan_in)^-0.5).
    """
    linear = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return BlockInit(nn.initializers.variance_scaling(1 / 2, "fan_in", "uniform"), linear, linear, linear)


class VitBlock(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added to it."""

    config: VitConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch 1 #tokens tokens"] | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Return the stream after this block, and nothing else for the scan to collect."""
        cfg, dtype, init = self.config, DTYPES[self.config.dtype], vit_init(self.config.width)
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm1")(x)
        x = stream(x + SelfAttention(cfg.heads, dtype, init, name="self_attn")(y, mask))
        y = LayerNorm(cfg.layer_norm_eps, dtype, name="layer_norm2")(x)
        return stream(x + Mlp(cfg.mlp_dim, cfg.activation, dtype, init, name="mlp")(y)), None


class VitEmbeddings(nn.Module):
    """Pixels to tokens: a class token and one token per patch, plus learned positions."""

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
        normal = nn.initializers.normal(cfg.width**-0.5)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        class_embedding = self.param("class_embedding", normal, (cfg.width,), jnp.float32)
        positions = self.param(
            "position_embedding", normal, (1 + math.prod(cfg.grid), cfg.width), jnp.float32
        )
        tokens = nn.Dense(
            cfg.width, use_bias=False, dtype=dtype, kernel_init=uniform, name="patch_embedding"
        )(patches)
        first = jnp.broadcast_to(class_embedding.astype(dtype), (tokens.shape[0], 1, cfg.width))
        positions = resize_positions(positions, cfg.grid, grid).astype(dtype)
        return stream(jnp.concatenate([first, tokens], axis=1) + positions[None])


class VitEncoder(nn.Module):
    """The blocks, scanned."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Run all layers."""
        blocks = stack(VitBlock, self.config.depth, self.config.remat)
        return blocks(self.config, name="layers")(x, None)[0]


class Vit(nn.Module):
    """CLIP's image tower. Its pooled output is the normalised class token, in float32."""

    config: VitConfig

    @nn.compact
    def __call__(
        self, pixel_values: Float[Array | np.ndarray, "batch height width channels"], *, train: bool = False
    ) -> TowerOutput:
        """Encode normalised images, channels last, of any size of at least one patch.

        With `train` and config.patch_dropout, a random share of the patches is left out (needs the "dropout"
        rng), so there are fewer tokens. last_hidden_state is not normalised, as in Hugging Face's model.
        """
        cfg = self.config
        check_pixels(pixel_values, cfg.patch_size)
        x = VitEmbeddings(cfg, name="embeddings")(pixel_values)
        if train and cfg.patch_dropout > 0.0:
            x = drop_patches(x, cfg.patch_dropout, self.make_rng("dropout"))
        x = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype], name="pre_layernorm")(x)
        x = VitEncoder(cfg, name="encoder")(x)
        pooled = LayerNorm(cfg.layer_norm_eps, jnp.float32, name="post_layernorm")(x[:, 0])
        return TowerOutput(last_hidden_state=x, pooler_output=constrain(pooled, "batch", None))


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
    x: Float[Array, "batch tokens width"], share: float, key: jax.Array
) -> Float[Array, "batch kept width"]:
    """Keep the class token and a random part of the patches, drawn per image (FLIP, arXiv:2212.00794)."""
    patches = x.shape[1] - 1
    keep = max(1, round(patches * (1.0 - share)))
    _, chosen = jax.lax.top_k(jax.random.uniform(key, (x.shape[0], patches)), keep)
    kept = jnp.take_along_axis(x[:, 1:], chosen[:, :, None], axis=1)
    return jnp.concatenate([x[:, :1], kept], axis=1)
