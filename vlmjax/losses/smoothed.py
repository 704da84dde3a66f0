"""Cross-entropy of next tokens with label smoothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def smoothed_cross_entropies(
    logits: Float[Array, "batch tokens vocab"],
    labels: Int[Array, "batch tokens"],
    learned: Bool[Array, "batch tokens"],
    smoothing: float,
) -> Float[Array, "batch tokens"]:
    """-(1 - smoothing) log p(label) - smoothing (mean of log p over all words) of each token, 0 where none is learned.

    As torch's `cross_entropy(label_smoothing=...)`, whose share goes to every word, the label included.

    Args:
      logits: of the word that comes next, float32.
      labels: that word; where nothing is learned, any.
      learned: which tokens count.
      smoothing: in [0, 1).
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    wanted = (1.0 - smoothing) * label + smoothing * logits.mean(axis=-1)
    return jnp.where(learned, total - wanted, 0.0)


def smoothed_cross_entropy(
    logits: Float[Array, "batch tokens vocab"],
    labels: Int[Array, "batch tokens"],
    learned: Bool[Array, "batch tokens"],
    smoothing: float,
) -> Float[Array, ""]:
    """The mean of `smoothed_cross_entropies` over the tokens learned, 0 where nothing is."""
    losses = smoothed_cross_entropies(logits, labels, learned, smoothing)
    return losses.sum() / jnp.maximum(learned.sum(dtype=jnp.float32), 1.0)
