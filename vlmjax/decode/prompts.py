"""Prompts on their way in: checked, padded to a length that many share so that few programs are compiled."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.errors import UserError

_SMALLEST, _STEP = 16, 256


def bucket(length: int) -> int:
    """The length to compile for: a power of two from 16 up to 256, then a multiple of 256."""
    if length > _STEP:
        return -(-length // _STEP) * _STEP
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def checked_mask(inputs: Mapping[str, Any]) -> np.ndarray:
    """The attention_mask of prompts, int32; ones where none is given.

    Raises:
      UserError: no prompts, prompts without tokens, a mask of another shape.
    """
    ids = inputs.get("input_ids")
    if ids is None or np.ndim(ids) != 2 or 0 in np.shape(ids):
        raise UserError(f"input_ids has shape {np.shape(ids)}; give [batch, tokens], both at least 1")
    mask = np.asarray(inputs.get("attention_mask", np.ones(np.shape(ids), np.int32)))
    if mask.shape != np.shape(ids):
        raise UserError(
            f"attention_mask has shape {mask.shape}, input_ids {np.shape(ids)}; give one of that shape"
        )
    empty = np.flatnonzero(~(mask != 0).any(axis=1))
    if empty.size:
        raise UserError(
            f"row {empty[0]} of attention_mask is all padding; give every prompt a token, e.g. bos"
        )
    return mask.astype(np.int32)


def bucketed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with prompts padded on the right to a shared length; everything that is [batch, tokens, ...] with them,
    except pixels, whose sides may be as long as a prompt by chance.

    Args:
      inputs: `input_ids` [batch, tokens], `attention_mask` like it (1 on tokens; may be left out), whatever else the
        model takes.

    Raises:
      UserError: see `checked_mask`.
    """
    mask = checked_mask(inputs)
    shape, more = mask.shape, bucket(mask.shape[1]) - mask.shape[1]
    out = dict(inputs) | {"attention_mask": mask}
    for name, value in out.items():
        if np.shape(value)[:2] == shape and not name.startswith("pixel_values"):
            value = np.asarray(value)
            out[name] = np.pad(value, [(0, 0), (0, more)] + [(0, 0)] * (value.ndim - 2))
    return out


def check_room(tokens: int, new: int, positions: int | None) -> None:
    """Raise UserError where more learned positions are asked for than there are (None: they have no limit)."""
    if new < 1:
        raise UserError(f"max_new_tokens is {new}; give 1 or more")
    if positions is not None and tokens + new > positions:
        raise UserError(
            f"{tokens} tokens and {new} new ones are more than the model's {positions} positions; "
            "shorten the prompt or lower max_new_tokens"
        )
