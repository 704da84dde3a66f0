"""Whole folders: from config.json and safetensors to a model with parameters, and back."""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.data.form import Form
from vlmjax.errors import HubError, RecipeError
from vlmjax.hub import (
    bert,
    blip,
    blip2,
    blip2_language,
    classifier,
    clip,
    llama,
    llava,
    opt,
    processor,
    safetensors,
    siglip,
    t5,
    table,
    vit,
)
from vlmjax.hub.family import Family, nearest
from vlmjax.hub.source import locate
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.blip import BlipCaptioner, BlipRetriever, Images
from vlmjax.models.blip2 import Blip2Retriever
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.models.classifier import Classifier
from vlmjax.models.clip import Clip, ClipText, ClipVision
from vlmjax.models.decoder import Decoder
from vlmjax.models.layers import DTYPES
from vlmjax.models.t5 import T5
from vlmjax.models.vlm import Seeing, Seq2SeqVlm, Vlm

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        clip.CLIP,
        clip.VISION,
        clip.VISION_PROJECTED,
        clip.TEXT,
        clip.TEXT_PROJECTED,
        bert.BERT,
        bert.DUAL_ENCODER,
        siglip.VISION,
        vit.VISION,
        classifier.CLIP,
        classifier.VIT,
        blip.CAPTION,
        blip.RETRIEVAL,
        blip.VQA,
        blip2.RETRIEVAL,
        blip2_language.GENERATION,
        llava.LLAVA,
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        opt.OPT,
        t5.GENERATION,
    )
}

# Which class a config.json without `architectures` describes.
_BY_TYPE = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
    "bert": "BertModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit": "ViTModel",
    "llava": "LlavaForConditionalGeneration",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "opt": "OPTForCausalLM",
    "t5": "T5ForConditionalGeneration",
}

# Which class a decoder is written as.
_BY_FAMILY = {"llama": llama.LLAMA, "mistral": llama.MISTRAL, "qwen2": llama.QWEN2, "opt": opt.OPT}

# Beside model.safetensors, and in its format: tensors that the Hugging Face class has no place for.
EXTRA = "vlmjax_extra.safetensors"

Shardings = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    shardings: Shardings | None = None,
    architecture: str | None = None,
    part: str | None = None,
    only: Callable[[str], bool] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a Hugging Face folder as `(model, params)`, to call as `model.apply({"params": params}, ...)`.

    Inputs (`pixel_values`, `input_ids`, ...) and outputs carry Hugging Face's names; images are
    channels-last, `pixel_values[batch, height, width, 3]`.

    Args:
        folder: a folder with config.json and safetensors (one file or shards), or a hub id, `owner/name` or
            `owner/name@revision`.
        dtype: of the parameters: float32, bfloat16 or float16, whatever the file holds.
        compute_dtype: of activations; by default `dtype`.
        shardings: nested dict of `jax.sharding.Sharding` like the parameters, or a function that makes one
            from the abstract parameters. Every device then reads its own part of the file. None: the default
            device.
        architecture: read the folder as this class; a tower can be cut out of a larger model, as
            CLIPVisionModel out of CLIPModel. By default what config.json says.
        part: `image` reads the image tower of whatever the folder holds, as ClipVision.
        only: of a parameter's "a/b/c" path, whether it is read; None: all are.

    Raises:
        HubError: the folder or id is not there, holds no safetensors or another architecture, asks for
            something the model does not do, or has missing, left-over or ill-shaped tensors (all listed).
    """
    path, family, left_behind, model = _open(folder, architecture, compute_dtype or dtype, part)
    expected = abstract_params(family, model)
    places = shardings(expected) if callable(shardings) else shardings
    weights = safetensors.open_folder(path, *[EXTRA] * bool(family.aside(model)))
    copies = family.copies(model)
    constants, found = family.constants(model), family.names.resolve(list(weights))
    _check_copies(copies, found, weights, path)
    _check_constants(constants, found, weights, path)
    ignored = (*family.names.ignored, *left_behind, *map(re.escape, (*copies, *constants)))
    names = family.names._replace(ignored=ignored)
    params = table.read(
        family.rows(model),
        weights,
        names,
        {name: leaf for name, leaf in expected.items() if name not in family.beside},
        dtype=DTYPES[_known(dtype, "dtype")],
        shardings=places,
        where=str(path),
        only=only,
    )
    scalars = {name: read_config(path).get(name, value) for name, value in family.beside.items()}
    wanted = {name: x for name, x in scalars.items() if x is not None and (only is None or only(name))}
    return model, {**params, **{name: jnp.float32(value) for name, value in wanted.items()}}


def load_model(folder: str | os.PathLike[str], part: str | None = None) -> nn.Module:
    """Return the module that `load(folder, part=part)` gives, from config.json alone: no weights are read.

    Raises:
        HubError: the folder or id is not there, or holds another architecture or one that we do not do.
    """
    return _open(folder, None, "float32", part, weights=False)[-1]


def save(
    model: nn.Module,
    params: Mapping[str, Any],
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    image_processor: Any = None,
    *,
    form: Form | None = None,
    clean: str = "",
    dtype: str = "float32",
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers (4 and 5) loads unchanged.

    `from_pretrained` of the class and of AutoModel read it; with a tokenizer and an image processor, the
    class's processor and AutoProcessor do too.

    Args:
        model: Clip, ClipVision, ClipText, Classifier, Bert, Decoder, T5, Vlm, or one of BLIP's or BLIP-2's.
        params: its parameters, on any device; arrays spread over several processes must be gathered first.
        folder: made if it is not there; an earlier model in it is replaced.
        tokenizer: `vlmjax.data.text.Tokenizer`, a transformers tokenizer, or a folder with one.
        image_processor: `vlmjax.data.images.EvalTransform`, a transformers image processor, the dict of its
            configuration, or a folder with one.
        form: how a model that writes was spoken to in training; with it the folder gets a chat template.
        clean: data.clean of its training, which `load_clean` gives again.
        dtype: of the tensors in the file.
        max_shard_bytes: above this the weights are split, with an index.

    Raises:
        HubError: the Hugging Face class cannot express the model, its parameters, or its processor; says why.
    """
    path = Path(folder)
    family = family_of(model)
    config = family.to_config(model)
    config |= {"architectures": [family.architecture], "torch_dtype": dtype}
    beside = {name: float(params[name]) for name in family.beside if name in params}
    config |= beside
    params = {name: value for name, value in params.items() if name not in beside}
    expected = abstract_params(family, model)
    kind = DTYPES[_known(dtype, "dtype")]
    tensors = table.write(family.rows(model), params, expected, dtype=kind)
    tensors |= {name: table.constant(value, kind) for name, value in family.constants(model).items()}
    settings = processor.check(family, model, tokenizer, image_processor)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(
            f"{path}: cannot be created ({error.strerror}); name a folder you may write to"
        ) from None
    aside = family.aside(model)
    held = {name: tensor for name, tensor in tensors.items() if name not in aside}
    safetensors.write_folder(held, path, max_shard_bytes=max_shard_bytes)
    (path / EXTRA).unlink(missing_ok=True)
    if aside:
        safetensors.write_file({name: tensors[name] for name in aside}, path / EXTRA)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    processor.write(family, model, tokenizer, settings, path, form, clean)


def family_of(model: nn.Module) -> Family:
    """Return the Hugging Face class that a model is written as."""
    match model:
        case Clip():
            return bert.DUAL_ENCODER if isinstance(model.config.text, BertConfig) else clip.CLIP
        case ClipVision():
            if not model.config.class_token:
                return siglip.VISION
            if not model.config.pre_norm:
                return vit.VISION
            return clip.VISION if model.projection_dim is None else clip.VISION_PROJECTED
        case Classifier():
            return classifier.family_of(model)
        case ClipText():
            return clip.TEXT if model.projection_dim is None else clip.TEXT_PROJECTED
        case Bert():
            return bert.BERT
        case Seeing() if model.config.bridge.kind == "qformer":
            return blip2_language.GENERATION
        case Seq2SeqVlm():
            raise HubError(
                f"no class of transformers has a bridge of kind {model.config.bridge.kind!r} before a T5; "
                "Blip2ForConditionalGeneration has one of kind 'qformer'. Keep this model as a checkpoint of vlmjax"
            )
        case Vlm():
            return llava.LLAVA
        case BlipRetriever():
            return blip.RETRIEVAL
        case Blip2Retriever():
            return blip2.RETRIEVAL
        case BlipCaptioner():
            return blip.CAPTION
        case BlipVqa():
            return blip.VQA
        case BlipNlvr():
            raise HubError(
                "BlipNlvr has no class in transformers: none looks at two images by two branches of cross-attention. "
                "Keep this model as a checkpoint of vlmjax"
            )
        case T5():
            return t5.GENERATION
        case Decoder():
            return _BY_FAMILY[model.config.family]
    raise HubError(
        f"{type(model).__name__} has no Hugging Face class here; supported: Clip, ClipVision, ClipText, Classifier, "
        "Bert, Decoder, T5, Vlm, those of BLIP and BLIP-2"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json of a folder."""
    file = path / "config.json"
    if not file.is_file():
        raise HubError(f"{path}: holds no config.json, so it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise HubError(f"{file}: holds a {type(config).__name__}, expected an object")
    return config


def abstract_params(family: Family, model: nn.Module) -> dict[str, Any]:
    """Return the shapes of a model's parameters without making them."""
    inputs = family.inputs(model)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]


def _open(
    folder: str | os.PathLike[str],
    architecture: str | None,
    compute_dtype: str,
    part: str | None = None,
    *,
    weights: bool = True,
) -> tuple[Path, Family, tuple[str, ...], nn.Module]:
    """Return where a folder is, the family to read it as, which tensors stay behind, and its module."""
    path = locate(folder, weights=weights)
    config = read_config(path)
    if part is not None:
        architecture = _tower_in(config, path)
    family, left_behind = _family(config, architecture, path)
    model = _with_compute(_build(family, config, path), _known(compute_dtype, "compute_dtype"))
    return path, family, left_behind, model


def _family(config: Mapping[str, Any], wanted: str | None, path: Path) -> tuple[Family, tuple[str, ...]]:
    """Return the family to read a folder as, and which tensors of the folder's class stay behind."""
    kind = str(config.get("model_type"))
    found = (config.get("architectures") or [_BY_TYPE.get(kind, kind)])[0]
    if not config.get("architectures") and wanted == f"{found}WithProjection":
        found = wanted  # the two share a model_type, and nothing else in the file tells them apart
    if wanted is None and classifier.POOL_KEY in config:
        pool = config[classifier.POOL_KEY]
        if pool not in classifier.BESIDE:
            raise HubError(
                f"{path}: {classifier.POOL_KEY} is {pool!r}; supported: {', '.join(classifier.BESIDE)}"
            )
        return classifier.BESIDE[pool], ()
    wanted = wanted or (found if found in FAMILIES else _only_part_of(found)) or found
    if wanted not in FAMILIES:
        raise HubError(f"{path}: architecture {wanted} is not supported; {nearest(wanted, FAMILIES)}")
    family = FAMILIES[wanted]
    if found == wanted:
        return family, ()
    if found not in family.within:
        raise HubError(f"{path}: holds {found}, which cannot be read as {wanted}; leave out `architecture`")
    return family, family.within[found]


def _tower_in(config: Mapping[str, Any], path: Path) -> str:
    """Return the class of the image tower that a folder holds, alone or within a larger model."""
    kind = str(config.get("model_type"))
    towers = (("clip", "CLIPVisionModel"), ("siglip", "SiglipVisionModel"), ("vit", "ViTModel"))
    for prefix, tower in towers:
        if kind in (prefix, f"{prefix}_vision_model"):
            return tower
    raise HubError(
        f"{path}: model_type {kind!r} has no image tower that can be taken alone; supported: clip, siglip, vit"
    )


def _only_part_of(found: str) -> str | None:
    """Return the one class that lives inside an unsupported class: BertModel in BertForMaskedLM."""
    parts = [name for name, family in FAMILIES.items() if found in family.within]
    return parts[0] if len(parts) == 1 else None


def _build(family: Family, config: Mapping[str, Any], path: Path) -> nn.Module:
    try:
        return family.to_model(config)
    except (HubError, RecipeError) as error:
        raise HubError(f"{path / 'config.json'}: {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise HubError(f"{path / 'config.json'}: a value has the wrong type ({error})") from error


def _with_compute(model: nn.Module, dtype: str) -> nn.Module:
    config = model.config
    if isinstance(model, (Clip, Images)):
        towers = {name: replace(getattr(config, name), dtype=dtype) for name in ("image", "text")}
        return model.clone(config=replace(config, **towers))
    if isinstance(model, Blip2Retriever):
        qformer = replace(config.qformer, bert=replace(config.qformer.bert, dtype=dtype))
        return model.clone(config=replace(config, image=replace(config.image, dtype=dtype), qformer=qformer))
    if isinstance(model, Classifier):
        return model.clone(config=replace(config, image=replace(config.image, dtype=dtype)))
    if isinstance(model, Seeing):
        parts = {name: replace(getattr(config, name), dtype=dtype) for name in ("image", "text", "bridge")}
        return model.clone(config=replace(config, **parts))
    return model.clone(config=replace(config, dtype=dtype))


def _check_copies(
    copies: Mapping[str, str], found: Mapping[str, str], weights: safetensors.Weights, path: Path
) -> None:
    """Raise HubError where two tensors differ that the configuration says are one."""
    for copy, original in copies.items():
        if copy in found and original in found:
            pair = found[copy], found[original]
            if not np.array_equal(*(weights[name] for name in pair)):
                raise HubError(
                    f"{path}: {pair[0]} differs from {pair[1]}, but config.json says they are one; "
                    "set tie_word_embeddings to false there, or remove the tensor that is not meant"
                )


def _check_constants(
    constants: Mapping[str, np.ndarray],
    found: Mapping[str, str],
    weights: safetensors.Weights,
    path: Path,
) -> None:
    """Raise HubError where a tensor that config.json makes a constant is another."""
    for name, value in constants.items():
        if name not in found or not np.array_equal(weights[found[name]], value):
            raise HubError(
                f"{path}: {found.get(name, name)} is not what config.json says it is ({name} belongs to a single "
                "projection written as two); read the folder without its key vlmjax_bridge to have both"
            )


def _known(dtype: str, argument: str) -> str:
    if dtype not in DTYPES:
        raise HubError(f"{argument} is {dtype!r}; supported: {', '.join(DTYPES)}")
    return dtype
