"""The head of a BERT that fills in masked words, with which BLIP's decoder begins; BertModel leaves it behind."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from vlmjax.hub import safetensors, table
from vlmjax.hub.bert import OLD_NORMS, language_head_rows, to_bert
from vlmjax.hub.folder import read_config
from vlmjax.hub.source import locate

_HEAD = "cls.predictions"


def has_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds such a head."""
    return any(name.startswith(f"{_HEAD}.") for name in safetensors.open_folder(locate(folder)))


def load_head(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `cls.predictions` of a BertForMaskedLM or BertForPreTraining: parameters of a med.LanguageHead.

    Args:
        folder: or a hub id, as `hub.load` takes it.

    Raises:
        HubError: no such folder, or one without such a head (a BertModel's).
    """
    path = locate(folder)
    config, weights = to_bert(read_config(path)), safetensors.open_folder(path)
    width = jax.ShapeDtypeStruct((config.width,), jnp.float32)
    expected = {
        "dense": {"kernel": jax.ShapeDtypeStruct((config.width, config.width), jnp.float32), "bias": width},
        "LayerNorm": {"scale": width, "bias": width},
        "bias": jax.ShapeDtypeStruct((config.vocab_size,), jnp.float32),
    }
    names = table.Names(OLD_NORMS, (rf"(?!{_HEAD}\.(bias|transform\.)).*",))
    return table.read(language_head_rows(_HEAD, ""), weights, names, expected, where=str(path))
