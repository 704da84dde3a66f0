"""How many floating-point operations a forward pass needs, for reporting utilisation (MFU)."""

import itertools
import math
from collections.abc import Mapping, Sequence

from vlmjax.models.bert import BertConfig
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.classifier import ClassifierConfig
from vlmjax.models.clip import ClipConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import VlmConfig


def forward_flops(
    config: ClipConfig | VitConfig | TextConfig | BertConfig,
    batch: int,
    *,
    text_length: int | None = None,
    train: bool = False,
) -> int:
    """Count the operations of a forward pass's matrix products over `batch` examples, two per multiply-add.

    A block of width W over T tokens: 8 T W^2 (q, k, v, out) + 4 T W M (MLP of M) + 4 T^2 W (scores and
    mixing; a causal mask is not deducted, since the products are computed in full). Patches add
    2 N (3 p^2) W, BERT's pooler 2 W^2, each projection 2 W P, and the logits 2 batch^2 P for the whole
    global batch, counted once although both directions of a sharded loss may compute them. Norms,
    activations and softmax are not counted.

    `text_length` is the number of tokens per text (config.max_length unless given); `train` takes patch
    dropout into account.
    """
    if isinstance(config, ClipConfig):
        towers = forward_flops(config.image, batch, train=train)
        towers += forward_flops(config.text, batch, text_length=text_length, train=train)
        projections = 2 * batch * (config.image.width + config.text.width) * config.projection_dim
        return towers + projections + 2 * batch**2 * config.projection_dim
    if isinstance(config, VitConfig):
        patches = math.prod(config.grid)
        embed = 2 * patches * 3 * config.patch_size**2 * config.width
        tokens = config.class_token + (config.kept_patches if train else patches)
        return batch * (embed + _blocks(config, tokens))
    pooler = 2 * config.width**2 if isinstance(config, BertConfig) else 0
    return batch * (pooler + _blocks(config, text_length or config.max_length))


def train_flops(config: ClipConfig, batch: int, *, locked: Sequence[str] = ()) -> int:
    """Count a training step: the backward pass costs twice the forward pass, recomputation is not model work.

    `locked` names the towers ("image", "text") without a trainable parameter: they have no backward pass.
    """
    total = 3 * forward_flops(config, batch, train=True)
    return total - 2 * sum(forward_flops(getattr(config, tower), batch, train=True) for tower in locked)


def classifier_train_flops(config: ClassifierConfig, batch: int, *, tower: bool) -> int:
    """Count a training step of a tower with a linear head; without `tower` the head alone has a backward pass."""
    width = config.projection_dim or config.image.width
    head = 2 * (config.image.width * config.projection_dim + width * len(config.names))
    return (3 if tower else 1) * forward_flops(config.image, batch, train=True) + 3 * batch * head


def decoder_flops(config: DecoderConfig, length: int) -> int:
    """Count the forward pass of one row of `length` tokens through a decoder, head included.

    Per token and layer 4 W H (q and out, H = heads x head_dim), 4 W K (k and v), 6 or 4 W M (gated or plain MLP) and
    4 T H (scores and mixing; the causal mask is not deducted). The head 2 W V.
    """
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = (6 if config.gated else 4) * config.width * config.mlp_dim
    layer = 4 * config.width * (queries + keys) + mlp + 4 * length * queries
    head = 2 * (config.embed_dim or config.width) * config.vocab_size
    return length * (config.depth * layer + head)


def vlm_train_flops(
    config: VlmConfig,
    batch: int,
    *,
    length: int,
    slots: int,
    trained: Sequence[str] = (),
    adapted: Mapping[str, int] | None = None,
) -> int:
    """Count a training step over rows of `length` tokens with `slots` images each.

    A part that is trained costs three forward passes; one that is not, but lies above one that is, two; else one.
    `adapted` says how many parameters of low-rank adapters a part has: it counts as one above something trained, and
    they themselves 6 for each of its tokens.
    """
    patches = math.prod(config.image.grid)
    tokens, features = patches + config.image.class_token, patches + config.keep_class
    tower = forward_flops(config.image, slots)
    bridge = slots * bridge_flops(config, features)
    parts = {"vision_model": tower, "bridge": bridge, "language_model": decoder_flops(config.text, length)}
    rows = {"vision_model": slots * tokens, "bridge": slots * features, "language_model": length}
    total, below, adapted = 0, False, adapted or {}
    for name, forward in parts.items():
        below = below or name in adapted
        total += forward * (3 if name in trained else 2 if below else 1)
        total += 6 * rows[name] * adapted.get(name, 0)
        below = below or name in trained
    return batch * total


def bridge_flops(config: VlmConfig, features: int) -> int:
    """Count a forward pass of the bridge over so many features of an image.

    A Q-Former of Q queries of width W costs per layer what BERT's costs, and where it looks at F features of width D
    4 Q W^2 (q, out) + 4 F D W (k, v) + 4 Q F W.
    """
    width, form = config.image.width * len(config.feature_layers), config.bridge.qformer
    looked, tokens = 0, features
    if form is not None:
        bert, tokens = form.bert, form.queries
        looks = -(-bert.depth // form.cross_attention_frequency)
        look = 4 * bert.width * (tokens * bert.width + features * width + tokens * features)
        looked, width = _blocks(bert, tokens) + looks * look, bert.width
    widths = [width, *[config.text.width] * config.bridge.projections]
    return looked + tokens * sum(2 * a * b for a, b in itertools.pairwise(widths))


def blip_train_flops(
    config: BlipConfig, batch: int, length: int, *, momentum: bool, itm: bool = True, lm: bool = True
) -> int:
    """Count a step of BLIP's pretraining on texts of `length` tokens, everything trained.

    An image pass, a text alone, and four texts that look at an image (three to be matched for `itm`, one to be
    written for `lm`), each three times for the backward pass; with `momentum` image and text alone once more. ITC is
    counted whatever its weight: it is computed for the draw of negatives and logged.
    """
    words = config.text
    image = forward_flops(config.image, 1, train=True)
    alone = _blocks(words, length)
    seeing = alone + _looks(words, length, _states(config), config.image.width)
    joint = 2 * (config.image.width + words.width) * config.projection_dim
    once = image + alone + joint
    looked = 3 * seeing * itm + (seeing + _word_scores(words, length)) * lm
    return batch * (3 * (once + looked) + (once if momentum else 0))


def blip_vqa_train_flops(
    config: BlipConfig, batch: int, length: int, answers: int, answer: int, *, trained: Sequence[str] = ()
) -> int:
    """Count a step on questions of `length` tokens with `answers` answers of `answer` tokens each.

    Questions look at images, answers at the states of their question. A part that is not trained costs one forward
    pass, or two above one that is.
    """
    words = config.text
    question = _blocks(words, length) + _looks(words, length, _states(config), config.image.width)
    # The states of a question are projected once for all of its answers.
    said = answers * (
        _blocks(words, answer) + _looks(words, answer, length, words.width) + _word_scores(words, answer)
    )
    said -= (answers - 1) * words.depth * 4 * length * words.width**2
    parts = {
        "vision_model": forward_flops(config.image, 1, train=True),
        "text_encoder": question,
        "text_decoder": said,
    }
    return batch * _trained(parts, trained)


def blip_nlvr_train_flops(config: BlipConfig, batch: int, length: int, *, trained: Sequence[str] = ()) -> int:
    """Count a step on statements of `length` tokens about two images, at each of which a layer looks."""
    words = config.text
    looks = 2 * _looks(words, length, _states(config), config.image.width)
    parts = {
        "vision_model": forward_flops(config.image, 2, train=True),
        "text_encoder": _blocks(words, length) + looks,
    }
    return batch * _trained(parts, trained)


def _trained(parts: Mapping[str, int], trained: Sequence[str]) -> int:
    """Forward passes of parts that lie above each other, with what their gradients cost."""
    total, below = 0, False
    for name, forward in parts.items():
        total += forward * (3 if name in trained else 2 if below else 1)
        below = below or name in trained
    return total


def _states(config: BlipConfig) -> int:
    return math.prod(config.image.grid) + 1


def _looks(words: BertConfig, length: int, states: int, width: int) -> int:
    """Looking at N states of width D: a layer of width W takes 4 T W^2 (q, out) + 4 N D W (k, v) + 4 T N W."""
    return words.depth * (4 * length * words.width**2 + 4 * states * words.width * (width + length))


def _word_scores(words: BertConfig, length: int) -> int:
    return 2 * length * words.width * (words.width + words.vocab_size)


def _blocks(config: VitConfig | TextConfig | BertConfig, tokens: int) -> int:
    per_token = 8 * config.width**2 + 4 * config.width * config.mlp_dim + 4 * tokens * config.width
    return config.depth * tokens * per_token
