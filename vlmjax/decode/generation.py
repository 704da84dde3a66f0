"""`generate`: prompts to tokens in one program. Options are named, and mean, as in transformers' `generate`.

Known differences from transformers: the result holds new tokens alone and always has max_new_tokens of them; `top_k`
has no limit unless given (transformers: 50); padding of the prompt does not count for a repetition penalty, so a
row's answer does not depend on the rows beside it; draws are JAX's, so a seed gives other samples. Those of beam
search are in beams.py.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Int

from vlmjax.decode import beams, loop
from vlmjax.decode.language import Language, Params, language_of
from vlmjax.decode.options import make_options
from vlmjax.decode.prompts import bucket, bucketed, check_room
from vlmjax.errors import UserError


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(language: Language, options: Any, new: int, *arguments: Any) -> Int[Array, "batch new"]:
    run = beams.run if options.num_beams > 1 else loop.run
    return run(language, options, new, *arguments)


def generate(
    model: nn.Module,
    params: Params,
    *,
    max_new_tokens: int,
    seed: int | Sequence[int] | np.ndarray = 0,
    **inputs_and_options: Any,
) -> Int[Array, "batch max_new_tokens"]:
    """Continue prompts.

    One program is compiled for each batch size, each `bucket` of prompt length and of max_new_tokens, and each set of
    options; it runs until every row has ended.

    Args:
      model: a Decoder, or any model that `language.language_of` knows.
      params: its parameters, in the dtype to compute in and placed as they are to be used.
      max_new_tokens: at most so many tokens per row.
      seed: of `do_sample`; the same seed gives the same draws. One for each row makes a row's draws its own, whatever
        rows it is generated with; not with beams.
      inputs_and_options: of the prompts, `input_ids` [batch, tokens], `attention_mask` like it (prompts of different
        lengths are padded on either side) and whatever else the model takes, `pixel_values` for one; and options:
        num_beams=1, do_sample=False, temperature=1.0, top_k=None, top_p=1.0, repetition_penalty=1.0,
        length_penalty=1.0, early_stopping=False, min_new_tokens=0, eos_token_id=None (one or several),
        pad_token_id=None (the first eos_token_id), stop_sequences=() of tokens. See `options.Options`.

    Returns:
      int32 tokens after each prompt; what ends a row is its last one before padding.

    Raises:
      UserError: an option or a prompt that cannot be, images that do not belong to it (a model's `check_inputs`), or a
        model that is no language model.
    """
    language, options, inputs = opened(model, params, max_new_tokens, inputs_and_options)
    key, limit = _key(seed, options, len(inputs["input_ids"])), jax.device_put(np.int32(max_new_tokens))
    out = _program(language, options, bucket(max_new_tokens), params, inputs, limit, key)
    return out[:, :max_new_tokens]


def _key(seed: int | Sequence[int] | np.ndarray, options: Any, rows: int) -> Array:
    """Of all rows, or of each. Raises UserError for another number of seeds than rows, or for beams of their own."""
    if np.ndim(seed) == 0:
        return jax.random.key(seed)
    if np.shape(seed) != (rows,) or options.num_beams > 1:
        raise UserError(
            f"seed has shape {np.shape(seed)} for {rows} rows and num_beams={options.num_beams}: give one number, or "
            "one for each row without beams"
        )
    return row_keys(np.asarray(seed, np.uint32))


def row_keys(seeds: Array | np.ndarray) -> Array:
    """One key for each seed, uint32 [rows]."""
    return jax.vmap(jax.random.key)(seeds)


_OPTIONS = (
    "num_beams do_sample temperature top_k top_p repetition_penalty length_penalty early_stopping min_new_tokens "
    "eos_token_id pad_token_id stop_sequences"
).split()


def opened(
    model: nn.Module, params: Params, max_new_tokens: int, inputs_and_options: dict[str, Any]
) -> tuple[Language, Any, dict[str, Any]]:
    """The model's language, checked options, and inputs on the device."""
    language = language_of(model)
    chosen = {name: value for name, value in inputs_and_options.items() if name in _OPTIONS}
    inputs = {name: value for name, value in inputs_and_options.items() if name not in _OPTIONS}
    options = make_options(**chosen)
    padded = bucketed(language.inputs(inputs))
    longest = int((padded["attention_mask"] != 0).sum(axis=1).max())
    check_room(longest, max_new_tokens, language.room(params))
    return language, options, jax.device_put(padded)
