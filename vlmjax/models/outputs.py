"""What models return: the attribute names of the Hugging Face outputs, on pytrees of arrays.

Fields are untyped because a pytree's leaves need not be arrays: jax also fills it with shapes and shardings.
"""

from typing import Any

import flax.struct


class TowerOutput(flax.struct.PyTreeNode):
    """One tower: last_hidden_state [batch, tokens, width], pooler_output [batch, width] in float32.

    `features` [batch, tokens, width x layers] are hidden states that an image tower was asked for.
    """

    last_hidden_state: Any
    pooler_output: Any
    features: Any = None


class VisionOutput(flax.struct.PyTreeNode):
    """An image tower alone; image_embeds [batch, dim] is not normalised; None if not projected."""

    last_hidden_state: Any
    pooler_output: Any
    image_embeds: Any = None


class TextOutput(flax.struct.PyTreeNode):
    """A text tower alone; text_embeds [batch, projection_dim] is not normalised; None if not projected."""

    last_hidden_state: Any
    pooler_output: Any
    text_embeds: Any = None


class ClipOutput(flax.struct.PyTreeNode):
    """A dual encoder. Embeddings are float32 of unit length; what needs an absent input is None.

    logits_per_image [images, texts] = exp(logit_scale) * image_embeds . text_embeds; logits_per_text is its
    transpose. `vision_model_output` and `text_model_output` are the towers' own outputs, before projection.
    """

    logits_per_image: Any = None
    logits_per_text: Any = None
    image_embeds: Any = None
    text_embeds: Any = None
    vision_model_output: TowerOutput | None = None
    text_model_output: TowerOutput | None = None


class BlipFeatures(flax.struct.PyTreeNode):
    """Features of BLIP, of every token: those of one mode, None elsewhere.

    Embeds are states: image_embeds [batch, states, image width], text_embeds and multimodal_embeds [batch, tokens,
    width]. Features are their float32 projections of unit length into the common space [batch, tokens, dim].
    """

    image_embeds: Any = None
    image_features: Any = None
    text_embeds: Any = None
    text_features: Any = None
    multimodal_embeds: Any = None
