"""Bridges: from the features of an image tower to what a language model reads in place of words."""

import dataclasses
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlmjax.errors import RecipeError
from vlmjax.models.layers import DTYPES, LayerNorm
from vlmjax.models.qformer import Qformer, QformerConfig
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.sharding.activations import constrain

KINDS = ("linear", "mlp", "identity", "qformer")


@dataclasses.dataclass(frozen=True)
class BridgeConfig:
    """What lies between tower and language model.

    Attributes:
      kind: `linear` (LLaVA, 2304.08485, section 4.1), `mlp` (LLaVA-1.5, 2310.03744, section 3.3), `identity`, for a
        tower that is as wide as the language model, or `qformer`: a norm, a Q-Former and a projection of its queries
        (BLIP-2, 2301.12597, section 3.3).
      depth: projections of an `mlp`, with an activation between each two.
      qformer: of a `qformer`, one that reads no text; it computes in `dtype`.
      norm_eps: of the norm before a `qformer`, see blip2_config.Blip2Config.
    """

    kind: str = "mlp"
    depth: int = 2
    activation: str = "gelu"
    bias: bool = True
    dtype: str = "float32"
    qformer: QformerConfig | None = None
    norm_eps: float = 1e-5

    def __post_init__(self):
        """Refuse what cannot be built."""
        for field, known in (("kind", KINDS), ("activation", ACTIVATIONS), ("dtype", DTYPES)):
            if getattr(self, field) not in known:
                raise RecipeError(
                    f"BridgeConfig.{field} is {getattr(self, field)!r}; choose one of {', '.join(known)}"
                )
        if self.kind == "mlp" and self.depth < 2:
            raise RecipeError(
                f"BridgeConfig.depth is {self.depth}; an mlp has at least 2, kind 'linear' is 1"
            )
        if (self.kind == "qformer") != (self.qformer is not None):
            raise RecipeError(
                f"BridgeConfig.kind is {self.kind!r} with qformer={self.qformer}; kind 'qformer' has one, others none"
            )
        if self.qformer is not None and self.qformer.reads_text:
            raise RecipeError("BridgeConfig.qformer reads texts, which no bridge gives it: reads_text=False")

    @property
    def projections(self) -> int:
        """How many projections there are."""
        return {"identity": 0, "linear": 1, "mlp": self.depth, "qformer": 1}[self.kind]

    def tokens(self, features: int) -> int:
        """How many tokens the language model gets for so many features of an image."""
        return features if self.qformer is None else self.qformer.queries


class Bridge(nn.Module):
    """Projections linear_1, linear_2, ... with an activation between each two, of features or of queries to them."""

    config: BridgeConfig
    width: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "images features _"]
    ) -> Float[Array, "images tokens {self.width}"]:
        """Map every feature vector, or every query, to the language model's `width`."""
        cfg = self.config
        if cfg.qformer is not None:
            config = replace(cfg.qformer, bert=replace(cfg.qformer.bert, dtype=cfg.dtype))
            features = LayerNorm(cfg.norm_eps, jnp.float32, name="ln_vision")(features)
            features, _ = Qformer(config, name="qformer")(features)
        x: Any = features.astype(DTYPES[cfg.dtype])
        if not cfg.projections and x.shape[-1] != self.width:
            raise RecipeError(
                f"bridge kind 'identity': the features are {x.shape[-1]} wide, the language model {self.width}; "
                "use kind 'linear' or 'mlp'"
            )
        for i in range(1, cfg.projections + 1):
            if i > 1:
                x = ACTIVATIONS[cfg.activation](x)
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            x = nn.Dense(
                self.width, use_bias=cfg.bias, dtype=DTYPES[cfg.dtype], kernel_init=init, name=f"linear_{i}"
            )(x)
        return constrain(x, "batch", None, None) if x.ndim == 3 else jnp.asarray(x)
