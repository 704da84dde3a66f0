"""BLIP-2's Q-Former (2301.12597, section 3.1): learned queries that look at an image, in one BERT with a text.

Queries and text share self-attention, and a mask says who sees whom; every `cross_attention_frequency`-th layer lets
the queries, and them alone, look at the image; each of the two has feed-forwards of its own. Parameters are made by
use: a Q-Former that never reads a text (BLIP-2's second stage) has neither words nor feed-forwards for them.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import INIT, BertAttention, BertConfig, BertIntermediate, BertJoin, Told, lookup_words
from vlmjax.models.layers import DTYPES, Ids, LayerNorm, check_length, stack, stream
from vlmjax.ops.attention import padding_mask

# Who sees whom, as (queries see text, text sees queries, text sees later text); queries always see each other.
MASKS = {
    "unimodal": (False, False, True),  # ITC: neither sees the other
    "causal": (False, True, False),  # ITG: a text that is written about what the queries saw
    "bidirectional": (True, True, True),  # ITM: all see all
}

Image = Float[Array | np.ndarray, "batch states image_width"]
Queries = Float[Array, "batch queries width"]
Text = Float[Array, "batch tokens width"]


@dataclasses.dataclass(frozen=True)
class QformerConfig:
    """Shape of a Q-Former.

    Attributes:
      bert: of its layers and words; without token types. BLIP-2's is BERT-base with one more word, [DEC].
      queries: learned query tokens.
      cross_attention_frequency: layers 0, this, twice this, ... look at the image.
      reads_text: whether it has words, and feed-forwards for them.
    """

    bert: BertConfig = BertConfig(768, 12, 12, 3072, vocab_size=30523, type_vocab_size=None)
    queries: int = 32
    cross_attention_frequency: int = 2
    reads_text: bool = True

    def __post_init__(self):
        """Refuse what cannot be built."""
        for field in ("queries", "cross_attention_frequency"):
            if getattr(self, field) < 1:
                raise RecipeError(f"QformerConfig.{field} is {getattr(self, field)}; give a positive number")
        if self.bert.type_vocab_size is not None:
            raise RecipeError(
                f"QformerConfig.bert has {self.bert.type_vocab_size} token types, a Q-Former has none: "
                "type_vocab_size=None"
            )


def qformer_mask(
    kind: str, queries: int, text_mask: Int[Array | np.ndarray, "batch tokens"]
) -> Bool[Array, "batch 1 together together"]:
    """Who may look at whom, queries first, then text: True where a row may look at a column (figure 2).

    Args:
      kind: one of MASKS.
      queries: how many there are.
      text_mask: 1 on tokens, 0 on padding, which nothing sees.

    Raises:
      RecipeError: another kind.
    """
    if kind not in MASKS:
        raise RecipeError(f"a Q-Former has no mask {kind!r}; choose one of {', '.join(MASKS)}")
    down, up, later = MASKS[kind]
    real = padding_mask(jnp.asarray(text_mask))
    place = jnp.arange(queries + real.shape[3])
    row, column = place[:, None], place[None, :]
    of_text = (row < queries) & down | (row >= queries) & (later | (column <= row))
    seen = jnp.where(column < queries, (row < queries) | up, of_text)[None, None]
    kept = jnp.concatenate([jnp.ones((*real.shape[:3], queries), bool), real], axis=3)
    return seen & kept


class QformerLayer(nn.Module):
    """Self-attention of queries and text together, a look of the queries at the image, a feed-forward each."""

    config: BertConfig
    looks: bool

    @nn.compact
    def __call__(
        self, queries: Queries | None, text: Text | None, told: Told
    ) -> tuple[Queries | None, Text | None]:
        """Return both after this layer."""
        own = BertAttention(self.config, name="attention")
        x = jnp.concatenate([part for part in (queries, text) if part is not None], axis=1)
        x = own(x, *own.keys_values(x), told.mask, told.train)
        count = 0 if queries is None else queries.shape[1]
        if queries is not None:
            queries = x[:, :count]
            if self.looks:
                cross = BertAttention(self.config, name="crossattention")
                made = cross.keys_values(told.context)
                queries = cross(queries, *made, told.context_mask, told.train)
            queries = self._feed_forward(queries, "_query", told.train)
        if text is not None:
            text = self._feed_forward(x[:, count:], "", told.train)
        return queries, text

    def _feed_forward(
        self, x: Float[Array, "batch tokens width"], kind: str, train: bool
    ) -> Float[Array, "batch tokens width"]:
        hidden = BertIntermediate(self.config, name=f"intermediate{kind}")(x)
        return BertJoin(self.config, name=f"output{kind}")(hidden, x, train)


class QformerGroup(nn.Module):
    """A layer that looks at the image and those after it that do not; groups are alike, so they can be scanned."""

    config: BertConfig
    layers: int

    @nn.compact
    def __call__(
        self, carried: tuple[Queries | None, Text | None], told: Told
    ) -> tuple[tuple[Queries | None, Text | None], None]:
        """Return both after this group, and nothing else for the scan to collect."""
        for i in range(self.layers):
            carried = QformerLayer(self.config, looks=i == 0, name=f"layer_{i}")(*carried, told)
        return carried, None


class QformerEmbeddings(nn.Module):
    """Words with their positions; they and the queries, which have none, are normalised and dropped out."""

    config: QformerConfig

    def setup(self):
        """Build tables, where a text is read, and the norm."""
        cfg = self.config.bert
        if self.config.reads_text:
            self.word_embeddings = self.param(
                "word_embeddings", INIT, (cfg.vocab_size, cfg.width), jnp.float32
            )
            self.position_embeddings = self.param(
                "position_embeddings", INIT, (cfg.max_length, cfg.width), jnp.float32
            )
        self.LayerNorm = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype])
        self.dropout = nn.Dropout(cfg.dropout)

    def text(self, input_ids: Ids, train: bool) -> Text:
        """Look words up; positions count from zero."""
        cfg = self.config.bert
        check_length(input_ids, cfg.max_length)
        words = lookup_words(self.word_embeddings, input_ids, cfg.pad_token_id)
        return self.join(words + self.position_embeddings[None, : input_ids.shape[1]], train)

    def join(self, x: Float[Array, "batch tokens width"], train: bool) -> Float[Array, "batch tokens width"]:
        """Normalise and drop out."""
        return stream(self.dropout(self.LayerNorm(x), deterministic=not train))


class Qformer(nn.Module):
    """The Querying Transformer."""

    config: QformerConfig

    def setup(self):
        """Build queries, embeddings and layers: all whole groups scanned, and the rest of a group after them."""
        cfg, bert = self.config, self.config.bert
        self.query_tokens = self.param("query_tokens", INIT, (cfg.queries, bert.width), jnp.float32)
        self.embeddings = QformerEmbeddings(cfg)
        every = cfg.cross_attention_frequency
        groups, rest = divmod(bert.depth, every)
        self.groups = stack(QformerGroup, groups, bert.remat)(bert, every) if groups else None
        self.rest = QformerGroup(bert, rest) if rest else None

    def __call__(
        self,
        image: Image | None = None,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
        *,
        mask: str = "bidirectional",
        train: bool = False,
    ) -> tuple[Queries | None, Text | None]:
        """States of the queries and of the text: both where there are both, in one pass.

        Args:
          image: states of each row's image; without, the text is read alone.
          input_ids: the text, padded on either side, positions counting from the first column; without, the queries
            are alone.
          attention_mask: 1 on tokens, 0 on padding; None: no padding.
          mask: who sees whom where there are both, one of MASKS.
          train: draw dropout from the "dropout" rng.

        Raises:
          UserError: neither, a text for a Q-Former without words, or more tokens than positions.
          RecipeError: another mask.
        """
        cfg = self.config
        if image is None and input_ids is None:
            raise UserError("a Q-Former was given neither image nor input_ids; give one of them, or both")
        if input_ids is not None and not cfg.reads_text:
            raise UserError(
                "this Q-Former has no words (reads_text=False), so it cannot read input_ids; leave them out, or use "
                "a model whose Q-Former reads text"
            )
        queries = text = seen = None
        if image is not None:
            tokens = jnp.broadcast_to(self.query_tokens[None], (image.shape[0], *self.query_tokens.shape))
            queries = self.embeddings.join(tokens, train)
        if input_ids is not None:
            text = self.embeddings.text(input_ids, train)
            real = jnp.ones(text.shape[:2], jnp.int32) if attention_mask is None else attention_mask
            seen = padding_mask(jnp.asarray(real))
            if queries is not None:
                seen = qformer_mask(mask, cfg.queries, real)
        carried, told = (
            (queries, text),
            Told(mask=seen, context=None if image is None else jnp.asarray(image), train=train),
        )
        for part in (self.groups, self.rest):
            if part is not None:
                carried, _ = part(carried, told)
        return carried
