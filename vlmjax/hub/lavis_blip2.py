"""BLIP-2's own checkpoints of the first stage, .pth files of LAVIS, and EVA's ViT-g that they begin with.

A file's tensors are those of transformers' class under older names, as in hub/lavis.py; training saves no frozen tower,
so it may be in a file of its own. Shapes say everything but the number of heads: widths of 88 in EVA's ViT-g, 64 in
the Q-Former. Source of the names: salesforce/LAVIS, models/{eva_vit.py,blip2_models/{Qformer,blip2_qformer}.py}.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub import blip2, table, torch_file
from vlmjax.hub.blip import vision_rows
from vlmjax.hub.lavis import HEAD_WIDTH, VISION_SPELLINGS
from vlmjax.hub.safetensors import Weights
from vlmjax.hub.table import Names, Row
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip2 import Blip2, example_inputs
from vlmjax.models.blip2_config import TEMPERATURE, Blip2Config, blip2_vit
from vlmjax.models.blip2_start import of_tower
from vlmjax.models.layers import DTYPES
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import Vit, VitConfig

EVA_HEAD_WIDTH = 88
_TOWER = r"visual_encoder\."
_SPELLINGS = (
    (r"^(model|module)\.", ""),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^Qformer\.cls\.", "cls."),
    (r"\.(attention|crossattention)\.self\.", r".\1.attention."),
    (r"^(vision|text)_proj\.", r"\1_projection."),
)
_IGNORED = (
    r"embeddings\.position_ids",
    r"cls\.predictions\.decoder\.(weight|bias)",
    r"temp",
    r"optimizer\..*",
)
# What of EVA's own file BLIP-2 leaves behind: the norm after the blocks and the classifier.
_EVA_REST = (r"vision_model\.post_layernorm\..*", r"(?!vision_model\.).*")


def load_lavis_blip2(
    file: str | os.PathLike[str],
    image: tuple[VitConfig, Mapping[str, Any]] | None = None,
    *,
    dtype: str = "float32",
) -> tuple[Blip2, dict[str, Any]]:
    """Open a .pth file of LAVIS' `blip2_pretrain` as `(model, params)`.

    Args:
        file: as torch.save left it; PyTorch is not needed.
        image: the tower, as `load_eva` or `hub.load` (of a CLIPVisionModel) give it, all its blocks taken but for the
            last of CLIP's; None: the one in the file, which is EVA's.
        dtype: of the parameters.

    Raises:
        HubError: no such file, no tower, or missing, left-over and ill-shaped tensors (all listed).
    """
    path = Path(file)
    weights = torch_file.open_file(path)
    names = Names(_SPELLINGS, (*_IGNORED, rf"{_TOWER}.*"))
    found = names.resolve(list(weights))
    if image is None and not any(re.search(rf"(^|\.){_TOWER}", name) for name in weights):
        raise HubError(
            f"{path}: holds no image tower, which training keeps frozen; give it as `image`, as load_eva reads it of "
            "eva_vit_g.pth or hub.load of a CLIPVisionModel"
        )
    source, tower = _read_eva(weights, path, dtype, None) if image is None else image
    config = _config({name: weights.shape(there) for name, there in found.items()}, source, path)
    model = Blip2(config)
    inputs = example_inputs(model)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    rest = {name: leaf for name, leaf in expected.items() if name not in ("temp", "vision_model")}
    rows = [row for row in blip2.retrieval_rows(model) if not row.paths[0].startswith("vision_model/")]
    params = table.read(rows, weights, names, rest, dtype=DTYPES[dtype], where=str(path))
    temperature = next((name for name in weights if re.fullmatch(r"((model|module)\.)*temp", name)), None)
    params["temp"] = jnp.float32(TEMPERATURE if temperature is None else weights[temperature])
    blocks = table.unflatten(of_tower(config.image, source, tower))
    return model, {**params, **blocks}


def load_eva(
    file: str | os.PathLike[str], *, depth: int = 39, dtype: str = "float32"
) -> tuple[VitConfig, dict[str, Any]]:
    """Open EVA's ViT-g (eva_vit_g.pth) as the configuration and parameters of a tower for `from_towers`.

    Of its blocks the first `depth` are read: BLIP-2 leaves the last one, the 40th, out.

    Raises:
        HubError: no such file, or missing, left-over and ill-shaped tensors (all listed).
    """
    path = Path(file)
    return _read_eva(torch_file.open_file(path), path, dtype, depth)


def _read_eva(
    weights: Weights, path: Path, dtype: str, depth: int | None
) -> tuple[VitConfig, dict[str, Any]]:
    """A tower of EVA, alone in a file or within one of the first stage."""
    inside = any(re.search(rf"(^|\.){_TOWER}", name) for name in weights)
    first = () if inside else ((r"^(?!visual_encoder\.)", "visual_encoder."),)
    spellings = ((r"^(model|module)\.", ""), *first, *VISION_SPELLINGS)
    names = Names(spellings, _EVA_REST)
    found = {name: weights.shape(there) for name, there in names.resolve(list(weights)).items()}
    blocks = {int(match[1]) for match in map(re.compile(r".*\.layers\.(\d+)\.").match, found) if match}
    kept = len(blocks) if depth is None else min(depth, len(blocks))
    try:
        width, _, patch, _ = found["vision_model.embeddings.patch_embedding.weight"]
        tokens = found["vision_model.embeddings.position_embedding"][1]
        mlp = found["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise HubError(f"{path}: {error} is missing or of another shape than EVA's") from error
    heads = max(1, width // EVA_HEAD_WIDTH)
    sizes = {"width": width, "depth": kept, "heads": heads, "mlp_dim": mlp, "patch_size": patch}
    config = blip2_vit("eva-g", math.isqrt(tokens - 1) * patch, **sizes)
    behind = tuple(rf".*\.layers\.{block}\..*" for block in sorted(blocks)[kept:])
    expected = _abstract(config)
    keys = expected["encoder"]["layers"]["self_attn"]["k_proj"].pop("bias")
    params = table.read(
        _eva_rows(config),
        weights,
        names._replace(ignored=(*names.ignored, *behind)),
        {"vision_model": expected},
        dtype=DTYPES[dtype],
        where=str(path),
    )
    # EVA has none: a softmax does not see a bias of keys.
    params["vision_model"]["encoder"]["layers"]["self_attn"]["k_proj"]["bias"] = jnp.zeros(
        keys.shape, DTYPES[dtype]
    )
    return config, params


def _abstract(config: VitConfig) -> dict[str, Any]:
    pixels = np.zeros((1, *config.image_shape, 3), np.float32)
    return jax.eval_shape(lambda: Vit(config).init(jax.random.key(0), pixels))["params"]


def _eva_rows(config: VitConfig) -> list[Row]:
    """Rows of a tower whose queries and values have biases of their own, and keys none."""
    rows = []
    for row in vision_rows(config):
        if row.hf.startswith("vision_model.post_layernorm"):
            continue
        if row.hf.endswith("self_attn.qkv.bias"):
            query, _, value = row.paths
            theirs = row.hf.removesuffix("qkv.bias")
            rows += [
                row._replace(hf=f"{theirs}q_bias", path=query),
                row._replace(hf=f"{theirs}v_bias", path=value),
            ]
        else:
            rows.append(row)
    return rows


def _config(shapes: Mapping[str, tuple[int, ...]], source: VitConfig, path: Path) -> Blip2Config:
    """The configuration that a file's shapes mean, with a tower that is given."""
    layers = [re.match(r"qformer\.encoder\.layer\.(\d+)\.", name) for name in shapes]
    looking = sorted(
        int(match[1])
        for match, name in zip(layers, shapes, strict=True)
        if match and name.endswith("crossattention.output.dense.bias")
    )
    try:
        queries, width = shapes["query_tokens"][1:]
        vocabulary = shapes["embeddings.word_embeddings.weight"][0]
        max_length = shapes["embeddings.position_embeddings.weight"][0]
        mlp = shapes["qformer.encoder.layer.0.intermediate.dense.bias"][0]
        dim = shapes["vision_projection.bias"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise HubError(
            f"{path}: {error} is missing or of another shape than in BLIP-2's first stage"
        ) from error
    depth = 1 + max(int(match[1]) for match in layers if match)
    bert = BertConfig(
        width,
        depth,
        max(1, width // HEAD_WIDTH),
        mlp,
        vocab_size=vocabulary,
        max_length=max_length,
        type_vocab_size=None,
    )
    every = looking[1] if len(looking) > 1 else depth
    form = {"pool": "none", "post_norm": False}
    image = VitConfig(**(vars(source) | form | {"depth": source.depth - (source.pool == "class")}))
    # [DEC] was added after BERT's last word.
    return Blip2Config(
        image, QformerConfig(bert, queries, every), dim, ln_vision_eps=1e-5, bos_token_id=vocabulary - 1
    )
