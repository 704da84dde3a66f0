"""Image-text matching (ITM): hard negatives drawn where the contrastive loss finds images and texts alike."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

# Added to every probability of being drawn, so that none is 0 (salesforce/BLIP, models/blip_pretrain.py).
LEAST = 1e-4


class Negatives(NamedTuple):
    """An image for each text and a text for each image that do not belong together.

    Attributes:
      image, text: int32 [blocks, rows]: number inside the block of the image drawn for each text, and the reverse.
      has_image, has_text: bool [batch]: whether there was one to draw.
    """

    image: Int[Array, "blocks rows"]
    text: Int[Array, "blocks rows"]
    has_image: Bool[Array, " batch"]
    has_text: Bool[Array, " batch"]

    def take(self, values: Array, drawn: Int[Array, "blocks rows"]) -> Array:
        """The rows of `values` [batch, ...] that were drawn, each from its own block."""
        blocks = values.reshape(*drawn.shape, *values.shape[1:])
        return jax.vmap(lambda rows, at: rows[at])(blocks, drawn).reshape(values.shape)


def draw_negatives(
    rng: PRNGKeyArray,
    image_embeds: Float[Array, "batch width"],
    text_embeds: Float[Array, "batch width"],
    image_keys: Float[Array, "batch width"],
    text_keys: Float[Array, "batch width"],
    scale: Float[Array, ""],
    ids: Sequence[UInt32[Array, " batch"]],
    valid: Bool[Array, " batch"],
    blocks: int,
) -> Negatives:
    """Draw one negative image for every text and one negative text for every image.

    The probability of image j for text i is softmax_j(scale * text_i . image_key_j) + LEAST, over the rows of the same
    block, without those whose caption or image is the same, the pair itself first of all, and without invalid ones;
    likewise for texts (Li et al. 2022, 2201.12086, section 3.2; the released code for the details). Nothing has a
    gradient.

    Args:
      rng: of the draw.
      image_embeds, text_embeds: of this batch, L2-normalised.
      image_keys, text_keys: by the momentum encoder, or the same again.
      scale: one over the temperature.
      ids: numbers of captions, and perhaps of images: where one of them is equal, two rows are no negatives.
      valid: rows that take part.
      blocks: neighbouring rows are drawn among in so many blocks: 1 for the whole batch, as many as devices for each
        device's own.
    """
    parts = [x.reshape(blocks, -1, *x.shape[1:]) for x in (image_embeds, text_embeds, image_keys, text_keys)]
    images, texts, image_keys, text_keys = jax.lax.stop_gradient(parts)
    there = valid.reshape(blocks, -1)
    allowed = there[:, :, None] & there[:, None, :]
    for one in (x.reshape(blocks, -1) for x in ids):
        allowed &= one[:, :, None] != one[:, None, :]
    of_text, of_image = jax.random.split(rng)
    has = allowed.any(axis=-1).reshape(-1)
    return Negatives(
        image=_draw(of_text, texts, image_keys, scale, there, allowed),
        text=_draw(of_image, images, text_keys, scale, there, allowed),
        has_image=has,
        has_text=has,
    )


def _draw(rng, queries, keys, scale, there, allowed) -> Int[Array, "blocks rows"]:
    scores = scale * jnp.einsum("bid,bjd->bij", queries, keys, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(there[:, None, :], scores.astype(jnp.float32), -jnp.inf)
    # A block without any valid row has no probabilities, and nothing is drawn in it.
    shares = jnp.nan_to_num(jax.nn.softmax(scores, axis=-1)) + LEAST
    return jax.random.categorical(rng, jnp.where(allowed, jnp.log(shares), -jnp.inf), axis=-1)


def match_loss(
    logits: Float[Array, "batch 3 2"], there: Bool[Array, "batch 3"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of (no match, match) over the pairs that there are, of which the first of each row matches.

    Returns:
      the mean loss, 0 for none, and `itm_accuracy`.
    """
    labels = jnp.broadcast_to(jnp.array([1, 0, 0]), there.shape)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    count = jnp.maximum(there.sum(dtype=jnp.float32), 1.0)
    right = (logits.argmax(axis=-1) == labels) & there
    return jnp.where(there, losses, 0.0).sum() / count, {"itm_accuracy": right.sum(dtype=jnp.float32) / count}
