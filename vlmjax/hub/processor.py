"""Tokenizer and image processor of a folder: read into ours, written for transformers 4 and 5."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from vlmjax.data import text
from vlmjax.data.captions import check_clean
from vlmjax.data.form import Form
from vlmjax.data.images import EvalTransform
from vlmjax.errors import DataError, HubError
from vlmjax.hub import chat, llava_processor
from vlmjax.hub.family import Family
from vlmjax.hub.source import locate
from vlmjax.models.bert import BertConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.t5_layers import T5Config
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Seeing

IMAGES = "preprocessor_config.json"
BOTH = "processor_config.json"  # transformers 5 nests the image processor in it, and prefers it
TOKENIZER = "tokenizer_config.json"
CLEAN = "vlmjax_clean"  # our own, in that file: data.clean of the model's training
Words = TextConfig | BertConfig | DecoderConfig | T5Config
# Processors that resize whole images to a square, whatever their shape was.
_SQUEEZING = ("BlipProcessor", "Blip2Processor")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")


def load_processor(folder: str | os.PathLike[str]) -> tuple[text.Tokenizer | None, EvalTransform | None]:
    """Open what prepares a folder's inputs: its tokenizer, at the model's length, and its image transform.

    Args:
        folder: a Hugging Face folder, or a hub id as `load` takes it.

    Returns:
        (tokenizer, transform); either is None where the folder holds none.

    Raises:
        HubError, DataError: the folder holds neither, or one that cannot be followed exactly.
    """
    path = locate(folder)
    settings = _image_settings(path)
    transform = None if settings is None else _transform(settings, str(path))
    tokenizer = None
    if any((path / name).is_file() for name in _VOCABULARIES):
        tokenizer = text.load(path, _max_length(path))
    if tokenizer is None and transform is None:
        raise HubError(f"{path}: holds neither a tokenizer ({', '.join(_VOCABULARIES)}) nor {IMAGES}")
    return tokenizer, transform


def load_clean(folder: str | os.PathLike[str]) -> str:
    """How captions were cleaned (`data.clean`) for the model of a folder; "" for one that was not written here.

    Raises:
        HubError: the folder is not there, or names a way that there is not.
    """
    path = locate(folder)
    try:
        return check_clean(_json(path / TOKENIZER).get(CLEAN, ""))
    except DataError as error:
        raise HubError(f"{path / TOKENIZER}: {CLEAN}: {error}; remove it or save the model again") from error


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{file}: not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _image_settings(path: Path) -> dict[str, Any] | None:
    nested = _json(path / BOTH).get("image_processor")
    return nested or _json(path / IMAGES) or None


def _max_length(path: Path) -> int:
    """Positions of the text model; where config.json has none, what the tokenizer says, or CLIP's 77."""
    config = _json(path / "config.json")
    holders = (
        config.get("text_config_dict"),
        config.get("text_config"),
        config.get("qformer_config"),
        config,
    )
    for holder in holders:
        if holder and "max_position_embeddings" in holder:
            positions = int(holder["max_position_embeddings"])
            if config.get("model_type") in (
                "blip",
                "blip-2",
            ):  # BERT's 512, of which it was trained to use some
                return min(positions, int(_json(path / TOKENIZER).get("model_max_length", positions)))
            return positions
    if "bert" in (config.get("model_type"), (config.get("text_config") or {}).get("model_type")):
        return 512
    stated = _json(path / TOKENIZER).get("model_max_length", 77)
    return int(stated) if stated < 1_000_000 else 77  # transformers writes 1e30 for "no limit"


def _transform(settings: Mapping[str, Any], where: str) -> EvalTransform:
    kinds = (settings.get("image_processor_type"), settings.get("processor_class"))
    if any(str(kind).startswith("Blip") for kind in kinds):  # never cuts; its files need not say so
        size = settings.get("size", 384)
        square = {"height": size, "width": size} if isinstance(size, int) else size
        settings = {**settings, "do_center_crop": False, "size": square}
    try:
        return EvalTransform.from_hf(settings)
    except DataError as error:
        raise HubError(f"{where}: {error}") from error


# ---- writing


def check(family: Family, model: nn.Module, tokenizer: Any, image_processor: Any) -> dict[str, Any] | None:
    """Return the image processor's configuration, after making sure that model and processor belong together.

    Raises:
        HubError: sizes or token ids of the processor are not the model's, or the model has no such input.
    """
    image, words = _towers(model)
    _check_tokenizer(family, words, tokenizer)
    if isinstance(model, Seeing) and isinstance(tokenizer, text.Tokenizer):
        llava_processor.check(model.config, tokenizer)
    if image_processor is None:
        return None
    if image is None:
        raise HubError(f"{family.architecture} has no images; leave out image_processor")
    transform = _as_transform(image_processor)
    if transform.output_size != image.image_shape:
        raise HubError(
            f"image_processor makes images of {transform.output_size}, but the model takes exactly "
            f"{image.image_shape} (height, width); give an image_processor of that size"
        )
    named = {} if family.processor is None else {"processor_class": family.processor}
    return (_blip_images(transform) if family.processor in _SQUEEZING else transform.to_hf()) | named


def _blip_images(transform: EvalTransform) -> dict[str, Any]:
    """Contents of preprocessor_config.json for BlipImageProcessor, which resizes whatever the shape was, and no more.

    Raises:
        HubError: the transform cuts images.
    """
    if not isinstance(transform.size, tuple) or transform.crop not in (None, transform.size):
        raise HubError(
            f"image_processor resizes to {transform.size} and crops to {transform.crop}; BlipProcessor squeezes whole "
            "images: give EvalTransform(size=(height, width), crop=None)"
        )
    settings = {key: value for key, value in transform.to_hf().items() if "crop" not in key}
    return settings | {"image_processor_type": "BlipImageProcessor", "do_center_crop": False}


def write(
    family: Family,
    model: nn.Module,
    tokenizer: Any,
    settings: Mapping[str, Any] | None,
    path: Path,
    form: Form | None = None,
    clean: str = "",
) -> None:
    """Write the files of tokenizer and image processor into a folder.

    `form` says how the model is spoken to, `clean` how it reads captions.
    """
    if settings is not None:
        (path / BOTH).unlink(missing_ok=True)  # of an earlier save by transformers 5, which would win
        _write_json(path / IMAGES, settings)
    (path / chat.JINJA).unlink(missing_ok=True)
    if tokenizer is None:
        return
    length = _towers(model)[1].max_length
    tokenizer = _as_tokenizer(tokenizer, length)
    if isinstance(tokenizer, text.Tokenizer):
        tokenizer.save(path)
    else:
        tokenizer.save_pretrained(str(path))
    stated = _json(path / TOKENIZER)
    if isinstance(model, Seeing) and family.processor == "Blip2Processor":
        # It puts so many placeholders before a text, opening token included, and leaves the text as it is.
        queries = {"num_query_tokens": model.config.image_tokens}
        _write_json(path / BOTH, {"processor_class": family.processor} | queries)
    elif isinstance(model, Seeing):
        ours = _as_ours(tokenizer, path, length)
        stated |= llava_processor.leave_open(ours, path) or {}
        llava_processor.write_generation(model.config, ours, form, path)
        _write_json(path / BOTH, llava_processor.settings(model.config))
    if form is not None:
        chat.write_form(form, stated, path)
    if clean:
        stated[CLEAN] = clean
    if family.processor is not None:
        stated["processor_class"] = family.processor
    stated["model_max_length"] = min(stated.get("model_max_length", length), length)
    _write_json(path / TOKENIZER, stated)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _as_ours(tokenizer: Any, path: Path, length: int) -> text.Tokenizer:
    """The tokenizer that has been written into a folder, as ours."""
    return tokenizer if isinstance(tokenizer, text.Tokenizer) else text.load(path, length)


def _towers(model: nn.Module) -> tuple[VitConfig | None, Words | None]:
    config = model.config
    if isinstance(config, VitConfig):
        return config, None
    if isinstance(config, (TextConfig, BertConfig, DecoderConfig, T5Config)):
        return None, config
    return config.image, getattr(config, "text", None)


def _as_transform(processor: Any) -> EvalTransform:
    if isinstance(processor, EvalTransform):
        return processor
    if isinstance(processor, Mapping):
        return _transform(processor, "image_processor")
    if isinstance(processor, (str, os.PathLike)):
        settings = _image_settings(Path(processor))
        if settings is None:
            raise HubError(f"{processor}: holds no {IMAGES}")
        return _transform(settings, str(processor))
    if hasattr(processor, "to_dict"):
        return _transform(processor.to_dict(), type(processor).__name__)
    raise HubError(
        f"image_processor is a {type(processor).__name__}; give an EvalTransform, a dict or a folder"
    )


def _check_tokenizer(family: Family, words: Words | None, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if words is None:
        raise HubError(f"{family.architecture} has no text; leave out tokenizer")
    tokenizer = _as_tokenizer(tokenizer, words.max_length)
    size = tokenizer.vocab_size if isinstance(tokenizer, text.Tokenizer) else len(tokenizer)
    if size > words.vocab_size:
        raise HubError(
            f"the tokenizer has {size} tokens, the model {words.vocab_size}; it is another model's tokenizer"
        )
    pools_at = getattr(words, "eos_token_id", 2)
    if pools_at not in (2, tokenizer.eos_token_id):
        raise HubError(
            f"the tokenizer ends texts with id {tokenizer.eos_token_id}, but the model pools at eos_token_id "
            f"{pools_at}; it is another model's tokenizer"
        )


def _as_tokenizer(tokenizer: Any, max_length: int) -> Any:
    """Return our Tokenizer or one of transformers'."""
    if isinstance(tokenizer, (str, os.PathLike)):
        return text.load(tokenizer, max_length)
    if isinstance(tokenizer, text.Tokenizer) or hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    raise HubError(f"tokenizer is a {type(tokenizer).__name__}; give a Tokenizer or a folder with one")
