"""Rotary positions (RoFormer, arXiv:2104.09864): pairs of channels turned by an angle that grows with the position."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmjax.errors import RecipeError

SCALINGS = ("none", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of a rotary embedding.

    Attributes:
      theta: base; channel pair i of n turns by position * theta**(-i/n).
      scaling: `none`; `linear` divides all frequencies by `factor` (arXiv:2306.15595); `llama3` divides those whose
        wavelength is beyond original_max_length / low_freq_factor, keeps those below original_max_length /
        high_freq_factor, and blends between (meta-llama/llama-models, models/llama3/model.py).
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        """Refuse what has no angles."""
        if self.scaling not in SCALINGS:
            raise RecipeError(f"Rope.scaling is {self.scaling!r}; choose one of {', '.join(SCALINGS)}")
        for field in ("theta", "factor", "low_freq_factor", "original_max_length"):
            if not getattr(self, field) > 0:
                raise RecipeError(f"Rope.{field} is {getattr(self, field)}; give a positive number")
        if self.high_freq_factor <= self.low_freq_factor:
            raise RecipeError(
                f"Rope.high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each channel pair: float32 [head_dim / 2], computed in float64."""
    pairs = head_dim // 2
    turn = rope.theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if rope.scaling == "linear":
        turn = turn / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_length * turn / (2 * math.pi)  # whole turns within the original length
        spread = rope.high_freq_factor - rope.low_freq_factor
        kept = np.clip((turns - rope.low_freq_factor) / spread, 0.0, 1.0)
        turn = kept * turn + (1 - kept) * turn / rope.factor
    return turn.astype(np.float32)


def angles(
    rope: Rope, positions: Int[Array, "batch tokens"], head_dim: int
) -> Float[Array, "batch tokens pairs"]:
    """Angle of every channel pair at every position, in float32: bfloat16 cannot tell 257 from 258."""
    return positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies(rope, head_dim))[None, None]


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], turned: Float[Array, "batch tokens pairs"]
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turn queries or keys by `angles`; channel i is paired with channel i + head_dim / 2, as in Hugging Face.

    Computed in float32, returned in the dtype of `x`. (Meta's own files pair neighbours: their q and k kernels have
    another order of rows.)
    """
    cos, sin = jnp.cos(turned)[:, :, None], jnp.sin(turned)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned_x = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned_x.astype(x.dtype)
