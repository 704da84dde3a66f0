"""BLIP's own checkpoints, .pth files of salesforce/BLIP and of LAVIS: names, and what a file without a config means.

A file's tensors are those of transformers' classes under older names, so they are read through the same tables. Its
shapes say everything but the number of heads, which is that of a width of 64 each. Source of the names:
salesforce/LAVIS, models/{vit,med}.py and models/blip_models/.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub import blip, table, torch_file
from vlmjax.hub.bert import encoder_rows
from vlmjax.hub.safetensors import Weights
from vlmjax.hub.table import Names, Row, linear, norm
from vlmjax.models import blip_tasks
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip, BlipCaptioner, BlipRetriever, example_inputs
from vlmjax.models.blip_config import TEMPERATURE, BlipConfig
from vlmjax.models.blip_start import resize_images
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa, twin_layers
from vlmjax.models.layers import DTYPES
from vlmjax.models.vit import VitConfig

HEAD_WIDTH = 64
SEP = 102  # of bert-base-uncased
# Of an image tower, in LAVIS as in timm.
VISION_SPELLINGS = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (
        r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision_model.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
_SPELLINGS = ((r"^model\.", ""), (r"^module\.", ""), *VISION_SPELLINGS)
# The momentum copies and queues of training, which fine-tuning and inference begin without; buffers; an optimizer.
_TRAINING = (r".*_m\..*", r"(image|text|idx)_queue", r"(queue_ptr|ptr_queue)", r"optimizer\..*")
_HEAD_COPIES = (r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)",)
# What of a file of pretraining stays behind where a half is read.
_OTHER_HALF = {
    "captioning": (r"text_encoder\..*", r"(vision_proj|text_proj|itm_head)\..*"),
    "retrieval": (r"text_decoder\..*",),
}
_BUFFERS = (r"(text_encoder|text_decoder\.bert)\.embeddings\.position_ids",)
FORMS = {
    "pretraining": Blip,
    "captioning": BlipCaptioner,
    "retrieval": BlipRetriever,
    "vqa": BlipVqa,
    "nlvr2": BlipNlvr,
}


def load_lavis(
    file: str | os.PathLike[str],
    form: str | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    dtype: str = "float32",
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a .pth file of salesforce/BLIP or LAVIS as `(model, params)`.

    Args:
        file: as torch.save left it; PyTorch is not needed.
        form: one of FORMS; None: what the file's tensors say. `captioning` and `retrieval` take their half of a file
            of pretraining.
        image_size: of the model; positions are resized to it. None: the file's, which is square.
        dtype: of the parameters.

    Raises:
        HubError: no such file, another form, or missing, left-over and ill-shaped tensors (all listed).
    """
    path = Path(file)
    weights = torch_file.open_file(path)
    names = Names(_SPELLINGS, (*_TRAINING, *_BUFFERS))
    found = names.resolve(list(weights))
    here = _form(found, path)
    form = here if form is None else form
    if form not in FORMS or (
        form != here and not (here == "pretraining" and form in ("captioning", "retrieval"))
    ):
        raise HubError(f"{path}: holds a model of {here}, which cannot be read as {form!r}; leave out `form`")
    model = FORMS[form](_config({name: weights.shape(there) for name, there in found.items()}, path))
    behind = [*_HEAD_COPIES, "temp"]
    if here == "pretraining":
        behind += _ties(weights, found, path) if form == here else _OTHER_HALF[form]
    params = table.read(
        _rows(model),
        weights,
        names._replace(ignored=(*names.ignored, *behind)),
        {name: leaf for name, leaf in _abstract(model).items() if name != "temp"},
        dtype=DTYPES[dtype],
        where=str(path),
    )
    if isinstance(model, BlipRetriever):
        params["temp"] = jnp.float32(weights[found["temp"]] if "temp" in found else TEMPERATURE)
    return (model, params) if image_size is None else resize_images(model, params, image_size)


def _form(found: Mapping[str, str], path: Path) -> str:
    """What a file holds, by what only one form has."""
    reads, writes = (
        any(name.startswith(part) for name in found) for part in ("text_encoder.", "text_decoder.")
    )
    if "cls_head.0.weight" in found and any(".crossattention.self0." in name for name in found):
        return "nlvr2"
    if reads and writes:
        return "pretraining" if "itm_head.weight" in found else "vqa"
    if reads and "itm_head.weight" in found:
        return "retrieval"
    if writes:
        return "captioning"
    raise HubError(
        f"{path}: holds no BLIP ({', '.join(list(found)[:4])}, ...); supported: {', '.join(FORMS)}"
    )


def _config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> BlipConfig:
    """The configuration that a file's shapes mean."""
    text = (
        "text_encoder."
        if "text_encoder.embeddings.word_embeddings.weight" in shapes
        else "text_decoder.bert."
    )
    try:
        width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        side = round((shapes["vision_model.embeddings.position_embedding"][1] - 1) ** 0.5) * patch
        vocabulary, text_width = shapes[f"{text}embeddings.word_embeddings.weight"]
        max_length = shapes[f"{text}embeddings.position_embeddings.weight"][0]
        mlp = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
        text_mlp = shapes[f"{text}encoder.layer.0.intermediate.dense.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise HubError(f"{path}: {error} is missing or of another shape than BLIP's") from error
    image = VitConfig(
        width=width,
        depth=_depth(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        heads=max(1, width // HEAD_WIDTH),
        mlp_dim=mlp,
        image_size=side,
        patch_size=patch,
        activation="gelu",
        layer_norm_eps=1e-6,
        init="normal",
        **blip.FORM,
    )
    words = BertConfig(
        width=text_width,
        depth=_depth(shapes, re.escape(text) + r"encoder\.layer\.(\d+)\."),
        heads=max(1, text_width // HEAD_WIDTH),
        mlp_dim=text_mlp,
        vocab_size=vocabulary,
        max_length=max_length,
        type_vocab_size=None,
    )
    # NLVR2's files come from a pretrained model too, but have no use for the common space.
    dim = shapes.get("vision_proj.weight", (256,))[0]
    # [DEC] and [ENC] were added after BERT's last token.
    return BlipConfig(
        image, words, dim, bos_token_id=vocabulary - 2, enc_token_id=vocabulary - 1, sep_token_id=SEP
    )


def _depth(shapes: Mapping[str, Any], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, name) for name in shapes) if match)


def _abstract(model: nn.Module) -> dict[str, Any]:
    """Shapes of a model's parameters."""
    one = isinstance(model, (BlipVqa, BlipNlvr))
    inputs = blip_tasks.example_inputs(model) if one else example_inputs(model)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]


def _rows(model: nn.Module) -> list[Row]:
    match model:
        case BlipRetriever():
            return blip.RETRIEVAL.rows(model)
        case BlipCaptioner():
            return blip.CAPTION.rows(model)
        case BlipVqa():
            return blip.VQA.rows(model)
    return nlvr_rows(model.config)


def _ties(weights: Weights, found: Mapping[str, str], path: Path) -> list[str]:
    """Names of the decoder's tensors that pretraining shares with the encoder. Raises HubError where two differ."""
    shared = []
    for name, there in found.items():
        if not name.startswith("text_decoder.bert.") or re.search(r"\.layer\.\d+\.attention\.", name):
            continue
        twin = found.get(name.replace("text_decoder.bert.", "text_encoder."))
        if twin is None or not np.array_equal(weights[there], weights[twin]):
            raise HubError(
                f"{path}: {there} is not what text_encoder has, which pretraining shares; read the halves: "
                "form='captioning', form='retrieval'"
            )
        shared.append(re.escape(name))
    return shared


def nlvr_rows(config: BlipConfig) -> list[Row]:
    """Rows of a BlipNlvr, which transformers has no class for."""
    rows = blip.vision_rows(config.image)
    rows += linear("cls_head.0", "cls_dense") + linear("cls_head.2", "cls_out")
    layers = twin_layers(config.text.depth)
    for row in encoder_rows(config.text, {"attention": "attention"}):
        row = row.under("text_encoder.", "text_encoder/")
        rows += [row] if row.layers is None else [_of(row, name, *ends) for name, ends in layers.items()]
    for name, ends in layers.items():
        rows += [_of(row, name, *ends) for row in _twin_rows(name == "merging")]
    return rows


def _twin_rows(merge: bool) -> list[Row]:
    """Rows of cross-attention over two images in one layer."""
    hf, path = (
        "text_encoder.encoder.layer.{layer}.crossattention",
        "text_encoder/encoder/layer/crossattention",
    )
    names = [f"self{i}.{part}" for i in range(2) for part in ("query", "key", "value")]
    names += ["output.dense0", "output.dense1", *["output.merge_layer"] * merge]
    rows = [
        row for name in names for row in linear(f"{hf}.{name}", f"{path}/{name.replace('.', '/')}", layers=1)
    ]
    return rows + norm(f"{hf}.output.LayerNorm", f"{path}/output/LayerNorm", layers=1)


def _of(row: Row, name: str, first: int, end: int) -> Row:
    """A row of all layers, of those alone that make up one stack."""
    path = row.path.replace("text_encoder/encoder/layer/", f"text_encoder/{name}/")
    return row._replace(path=path, layers=end - first, first=first)
