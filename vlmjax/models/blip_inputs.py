"""What BLIP is given, on the host: images checked, prompts opened."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.errors import UserError
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.vit import check_pixels


def open_prompt(inputs: Mapping[str, Any], config: BlipConfig) -> dict[str, np.ndarray]:
    """input_ids and attention_mask of texts that begin with [DEC] and are not closed by [SEP], which is masked."""
    ids = inputs.get("input_ids")
    if ids is None:
        ids = np.full((len(inputs["pixel_values"]), 1), config.bos_token_id, np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ids = np.array(ids, np.int32)  # a copy: the caller's own stays as it is
    mask = np.array(inputs.get("attention_mask", np.ones_like(ids)), np.int32)
    if mask.shape != ids.shape or ids.ndim != 2:
        return {
            "input_ids": ids,
            "attention_mask": mask,
        }  # refused, with all shapes, where prompts are checked
    rows, real = np.arange(len(ids)), mask != 0
    last = ids.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    closed = (ids[rows, last] == config.sep_token_id) & (real.sum(axis=1) > 1)
    mask[rows[closed], last[closed]] = 0
    ids[rows, np.argmax(real, axis=1)] = config.bos_token_id
    return {"input_ids": ids, "attention_mask": mask}


def caption_prompt(prompt: str, tokenizer: Any, config: BlipConfig) -> np.ndarray:
    """The ids, int32 [tokens], that a caption which begins with `prompt` goes on from; [DEC] alone for none."""
    if not prompt:
        return np.array([config.bos_token_id], np.int32)
    found = open_prompt({"input_ids": np.array([tokenizer.encode(prompt)], np.int32)}, config)
    return found["input_ids"][0][found["attention_mask"][0] > 0]


def check_images(inputs: Mapping[str, Any], config: BlipConfig) -> None:
    """Raise UserError, on the host, unless there is one image for each text."""
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if pixels is None:
        raise UserError("pixel_values is missing; give one normalised image for each text")
    check_pixels(pixels, config.image.patch_size)
    if ids is not None and len(ids) != len(pixels):
        raise UserError(f"{len(ids)} texts and {len(pixels)} images; give one image for each text")


def blank(config: BlipConfig) -> tuple[np.ndarray, np.ndarray]:
    """A blank image and a text of one token."""
    return np.zeros((1, *config.image.image_shape, 3), np.float32), np.zeros((1, 1), np.int32)
