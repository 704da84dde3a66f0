"""What a recipe says of its data, as objects: the same ones for training and for those who look over its shoulder."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlmjax.config_checks import BLIP_STAGES, EACH
from vlmjax.data import bpe, mixture, text
from vlmjax.data.augment import TrainTransform
from vlmjax.data.conversation import MARK
from vlmjax.data.generative import Rows
from vlmjax.data.labels import Classes
from vlmjax.data.pieces import Pieces
from vlmjax.data.pipeline import TrainData
from vlmjax.data.plan import permute
from vlmjax.data.questions import Questions
from vlmjax.data.sources import EachCaption, Source, captions_of, open_sources, turns_of
from vlmjax.data.statements import Statements
from vlmjax.errors import DataError, HubError, RecipeError

DEC, ENC = "[DEC]", "[ENC]"  # of BLIP: they stand before a text that is to be written, or read with its image
# Captions read to train a "bpe:N" tokenizer; more change its merges little.
BPE_CAPTIONS = 20_000
# Batches of a window of grouped rows: with few of them, the last one, which is not full, would count.
_GROUPED = 16
SMALLEST_BPE = 514  # 2 x 256 bytes and two special tokens


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """What cannot be opened inside is a mistake of the recipe: a RecipeError that names the key that led there."""
    try:
        yield
    except (DataError, HubError) as error:
        raise RecipeError(f"config.{key}: {error}") from error


def open_train_sources(recipe: Any) -> tuple[list[Source], tuple[float, ...]]:
    """The sources that `recipe.data` names, and the share of the run that each supplies."""
    with naming("data.train"):
        size, exclude = recipe.model.image.image_size, recipe.data.exclude or None
        columns = {
            "image_column": recipe.data.image_column or None,
            "caption_columns": tuple(recipe.data.caption_columns) or None,
        }
        sources = open_sources(
            recipe.data.train, seed=recipe.seed, image_size=size, exclude=exclude, **columns
        )
    if recipe.data.captions == EACH:
        sources = [EachCaption(source) for source in sources]
    with naming("data.weights"):
        return sources, mixture.shares(
            [len(source) for source in sources], recipe.data.mix, recipe.data.weights
        )


def tokenizer_name(recipe: Any) -> str:
    """The folder, id or "bpe:N" that a recipe's tokenizer comes from; no "bpe:N" replaces that of an imported model."""
    name, source = recipe.data.tokenizer, recipe.init_from or _words_from(recipe)
    return source if source and (not name or name.startswith("bpe:")) else name


def _words_from(recipe: Any) -> str:
    """The folder whose text model, and so whose tokenizer, a recipe imports."""
    return recipe.model.get("text_from" if recipe.stage in BLIP_STAGES else "language_from", "")


def special_tokens(recipe: Any) -> tuple[str, ...]:
    """What a recipe's tokenizer has beyond its own vocabulary.

    The mark of an image where rows are conversations; with BLIP what texts to be written and to be read begin with.
    """
    if recipe.stage in BLIP_STAGES:
        return (DEC, ENC)
    return (MARK,) if recipe.stage == "generative" else ()


def open_tokenizer(
    name: str, source: Source | None, max_length: int, special: Sequence[str] = ()
) -> text.Tokenizer:
    """A tokenizer by its folder or hub id; "bpe:N" learns one of N tokens from captions of `source`.

    `special` are tokens that it gets where it does not have them.

    Raises:
        DataError: nothing readable there, or no such size.
    """
    found = _open_tokenizer(name, source, max_length)
    for token in special:
        found = text.with_token(found, token)
    return found


def _open_tokenizer(name: str, source: Source | None, max_length: int) -> text.Tokenizer:
    if not name.startswith("bpe:"):
        return text.load(name, max_length)
    size = name.removeprefix("bpe:")
    if not size.isdigit() or int(size) < SMALLEST_BPE:
        raise DataError(f"{name!r}: expected 'bpe:' and a number from {SMALLEST_BPE}, e.g. 'bpe:1024'")
    with tempfile.TemporaryDirectory() as folder:
        bpe.train_bpe(sample_captions(source), int(size), folder, model_max_length=max_length)
        return text.load(folder, max_length)


def sample_captions(source: Source) -> Iterator[str]:
    """Captions from all over a source, so that every part of it gives its words; an unreadable record has none.

    Of a conversation of several rounds what everybody says.
    """
    left = BPE_CAPTIONS
    order = permute(np.arange(min(left, len(source))), len(source), seed=0, epoch=0)
    for i in order.tolist():
        try:
            captions = _texts_of(source, i)[:left]
        except Exception:  # of whatever kind: training meets this record again, counts it and says why
            captions = ()
        yield from captions
        left -= max(len(captions), 1)  # records without any count too: the search ends
        if left <= 0:
            return


def _texts_of(source: Source, i: int) -> Sequence[str]:
    """The captions of example i, or what is said in its conversation."""
    captions = captions_of(source, i)
    return captions or [turn["value"].replace(MARK, " ").strip() for turn in turns_of(source, i)]


def train_data(
    recipe: Any,
    sources: list[Source],
    shares: tuple[float, ...],
    tokenizer: text.Tokenizer | None,
    image_size: int | tuple[int, int],
    *,
    image_tokens: int | None = None,
    classes: Classes | None = None,
    **options: Any,
) -> TrainData:
    """The batches of a recipe: random crops and colours that end at the model's image size, captions, tokens.

    With stage "generative" rows of conversations, see `generative.GenerativeExamples`.

    Args:
        recipe, sources, shares, tokenizer: as opened here.
        image_size: of the model's images, pixels.
        image_tokens: of an image, for conversations; by default one for each patch.
        classes: of a labelled set, for stage "classification".
        options: those of TrainData that no recipe holds, or that go before what it says.

    Raises:
        DataError: as of TrainData, or a tokenizer without `special_tokens`.
    """
    data, background = recipe.data, tuple(recipe.data.background)
    settings = {
        "batch_size": recipe.batch_size,
        "shares": shares,
        "seed": recipe.seed,
        "threads": data.threads or None,
        "processes": data.processes,
        "max_bad_share": data.max_bad_share,
        "captions": "first" if data.captions == EACH else data.captions,
        "image_ids": recipe.loss.positives == "images",
        "templates": data.templates,
        "clean": data.clean,
        "background": background,
        "cache_decoded": data.cache_decoded or None,
    }
    if recipe.stage == "generative":
        with naming("data.conversation.template"):
            Pieces(tokenizer).template(data.conversation.template)
        settings["kind"] = generative_rows(recipe, tokenizer, image_size, image_tokens)
    if recipe.stage == "blip_vqa":
        settings["kind"] = Questions(data.answers, data.answer_length)
    if recipe.stage == "blip_nlvr":
        settings["kind"] = Statements()
    if recipe.stage == "classification":
        settings["kind"] = classes
    pad = tuple(data.mean) if data.pad_to_square else None
    transform = TrainTransform(image_size, data.augment.to_dict(), background=background, pad=pad)
    return TrainData(sources, transform, tokenizer, **settings | options)


def generative_rows(
    recipe: Any,
    tokenizer: text.Tokenizer,
    image_size: int | tuple[int, int],
    image_tokens: int | None = None,
) -> Rows:
    """What a row of conversations is, by a recipe; arguments as of `train_data`. Raises DataError."""
    data, patch = recipe.data, recipe.model.image.patch_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    number = tokenizer.token_id(MARK)
    if number is None:
        raise DataError(f"the tokenizer has no token {MARK!r}: open it with recipe.special_tokens")
    return Rows(
        data.conversation.template,
        data.max_length,
        (height // patch) * (width // patch) if image_tokens is None else image_tokens,
        number,
        images_per_row=data.images_per_row,
        packing=data.packing,
        lengths=tuple(data.lengths),
        window=max(Rows.window, _GROUPED * recipe.batch_size if data.lengths else 0),
        image_first=data.conversation.image_first,
        system=data.conversation.system,
        blind=data.blind,
    )
