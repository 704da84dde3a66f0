"""BLIP-2 in its first stage (2301.12597, section 3.2): a frozen image tower, and a Q-Former that learns to read it.

`Blip2` is the model of pretraining: contrast (ITC), writing (ITG), matching (ITM). `Blip2Retriever` is what is left
without the writing. How they begin with a ViT and a BERT is in models/blip2_start.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmjax.models.bert import INIT
from vlmjax.models.blip2_config import TEMPERATURE, Blip2Config
from vlmjax.models.layers import Ids, LayerNorm
from vlmjax.models.med import LanguageHead, first_token
from vlmjax.models.qformer import Qformer
from vlmjax.models.vit import Vit
from vlmjax.ops.norms import l2_normalize
from vlmjax.sharding.activations import constrain

Pixels = Float[Array | np.ndarray, "batch height width channels"]
ImageStates = Float[Array, "batch states image_width"]


class Blip2Retriever(nn.Module):
    """Tower, Q-Former, projections and matching head: Blip2ForImageTextRetrieval."""

    config: Blip2Config

    def setup(self):
        """Build all parts, and the temperature."""
        cfg = self.config
        self.vision_model = Vit(cfg.image)
        self.ln_vision = LayerNorm(cfg.ln_vision_eps, jnp.float32)
        self.qformer = Qformer(cfg.qformer)
        self.vision_proj = nn.Dense(cfg.projection_dim, dtype=jnp.float32, kernel_init=INIT)
        self.text_proj = nn.Dense(cfg.projection_dim, dtype=jnp.float32, kernel_init=INIT)
        self.itm_head = nn.Dense(2, dtype=jnp.float32, kernel_init=INIT)
        if self.is_initializing():
            # Read by the loss alone, as params["temp"].
            self.param("temp", nn.initializers.constant(TEMPERATURE), (), jnp.float32)

    def __call__(
        self,
        pixel_values: Pixels,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        use_itm_head: bool = True,
    ) -> Float[Array, "images scores"]:
        """Scores of transformers' `logits_per_image`.

        Returns:
          with `use_itm_head` logits of (no match, match) [batch, 2] of image and text of each row; without, the cosine
          of each text with the query of each image that is closest to it [images, texts].
        """
        states = self.encode_image(pixel_values)
        if use_itm_head:
            return self.match(states, input_ids, attention_mask)
        images = self.embed_image(self.encode_queries(states))
        return best_queries(images, self.embed_text(self.encode_text(input_ids, attention_mask)))

    def encode_image(self, pixel_values: Pixels, train: bool = False) -> ImageStates:
        """States of images, normalised in float32. With `train`, drop_path draws from the "dropout" rng."""
        return self.ln_vision(self.vision_model(pixel_values, train=train).last_hidden_state)

    def encode_queries(
        self, image_states: ImageStates, train: bool = False
    ) -> Float[Array, "batch queries width"]:
        """What the queries find in images, without any text."""
        return self.qformer(image_states, train=train)[0]

    def encode_text(
        self, input_ids: Ids, attention_mask: Ids | None = None, train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """States of texts alone, which begin with [CLS]."""
        return self.qformer(None, input_ids, attention_mask, train=train)[1]

    def embed_image(
        self, query_states: Float[Array, "images queries width"]
    ) -> Float[Array, "images queries dim"]:
        """Each query of an image in the common space: float32, unit length."""
        projected = self.vision_proj(query_states.astype(jnp.float32))
        return l2_normalize(constrain(projected, "batch", None, None))

    def embed_text(self, text_states: Float[Array, "texts tokens width"]) -> Float[Array, "texts dim"]:
        """Texts in the common space, of their first token: float32, unit length."""
        projected = self.text_proj(text_states[:, 0].astype(jnp.float32))
        return l2_normalize(constrain(projected, "batch", None))

    def match(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch 2"]:
        """Logits of (no match, match) of image and text of each row, in float32: the mean of what each query says."""
        queries, _ = self.qformer(image_states, input_ids, attention_mask, mask="bidirectional", train=train)
        return constrain(self.itm_head(queries.astype(jnp.float32)).mean(axis=1), "batch", None)


class Blip2(Blip2Retriever):
    """Everything that the first stage needs: also writes, each token seeing the queries and those before it."""

    def setup(self):
        """Build the head too."""
        super().setup()
        self.head = LanguageHead(self.config.qformer.bert)

    def decode_text(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """States of texts that are written about images, beginning with [DEC]; `logits` makes scores of them."""
        ids = first_token(input_ids, attention_mask, self.config.bos_token_id)
        return self.qformer(image_states, ids, attention_mask, mask="causal", train=train)[1]

    def logits(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        return self.head(hidden, self.qformer.embeddings.get_variable("params", "word_embeddings"))


def best_queries(
    images: Float[Array, "images queries dim"], texts: Float[Array, "texts dim"]
) -> Float[Array, "images texts"]:
    """How alike images and texts are: of each text, the query of an image that is closest to it (section 3.2)."""
    each = jnp.einsum("iqd,td->iqt", images, texts, precision=jax.lax.Precision.HIGHEST)
    return each.max(axis=1)


def example_inputs(model: Blip2Retriever) -> dict[str, Any]:
    """What `model.init` needs to make all parameters."""
    pixels = np.zeros((1, *model.config.image.image_shape, 3), np.float32)
    ids = np.zeros((1, 1), np.int32)

    def everything(module: Blip2Retriever) -> None:
        states = module.encode_image(pixels)
        module.embed_image(module.encode_queries(states)), module.embed_text(module.encode_text(ids))
        module.match(states, ids)
        if isinstance(module, Blip2):
            module.logits(module.decode_text(states, ids))

    return {"method": everything}
