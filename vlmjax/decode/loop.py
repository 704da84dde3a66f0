"""Token after token, one per row: what `generate` runs inside one program and `stream` one step at a time."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from vlmjax.decode import choosing
from vlmjax.decode.language import Language, Params, Prefilled, advance, prefill
from vlmjax.decode.options import Options
from vlmjax.models.cache import Cache


@struct.dataclass
class State:
    """Where generation stands.

    Attributes:
      out: new tokens, padding where there is none yet.
      positions: of each row's next token.
      done: rows that have ended.
      seen: tokens of prompt and answer, for a repetition penalty.
      step: how many tokens there are.
      key: of what is drawn; with one for each row, a row's draws do not depend on the others.
    """

    cache: Cache
    out: Int[Array, "rows new"]
    positions: Int[Array, " rows"]
    done: Bool[Array, " rows"]
    seen: Bool[Array, "rows vocab"] | None
    step: Int[Array, ""]
    key: Key[Array, "*rows"]


def start(
    language: Language,
    options: Options,
    new: int,
    params: Params,
    inputs: Mapping[str, Any],
    key: Key[Array, "*rows"],
) -> State:
    """Read the prompts and choose the first token; there is room for `new` of them."""
    return begin(options, new, inputs, prefill(language, params, inputs, new), key)


def begin(
    options: Options, new: int, inputs: Mapping[str, Any], read: Prefilled, key: Key[Array, "*rows"]
) -> State:
    """Choose the first token after prompts that were read."""
    cache, logits, positions = read
    rows, vocab = logits.shape
    state = State(
        cache=cache,
        out=jnp.full((rows, new), options.pad_token_id, jnp.int32),
        positions=positions,
        done=jnp.zeros((rows,), bool),
        seen=choosing.seen_in(options, inputs["input_ids"], inputs["attention_mask"], vocab),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )
    return take(options, state, logits)


def take(options: Options, state: State, logits: Float[Array, "rows vocab"]) -> State:
    """Choose the next token of each row, padding where it has ended."""
    # A key per step, not a chain of splits: a stream and a program that runs ahead draw the same.
    fold = jax.vmap(jax.random.fold_in, (0, None)) if state.key.ndim else jax.random.fold_in
    key = fold(state.key, state.step)
    tokens = choosing.choose(options, logits, state.seen, state.step, key)
    tokens = jnp.where(state.done, options.pad_token_id, tokens)
    out = jax.lax.dynamic_update_slice(state.out, tokens[:, None], (jnp.zeros((), jnp.int32), state.step))
    return state.replace(
        out=out,
        done=state.done | choosing.ends(options, out, state.step),
        seen=choosing.also_seen(state.seen, tokens),
        step=state.step + 1,
    )


def step(language: Language, options: Options, params: Params, state: State) -> State:
    """One more token per row."""
    tokens = jax.lax.dynamic_slice_in_dim(state.out, state.step - 1, 1, axis=1)[:, 0]
    logits, cache = advance(language, params, tokens, state.positions, state.cache)
    return take(options, state.replace(cache=cache, positions=state.positions + 1), logits)


def run(
    language: Language,
    options: Options,
    new: int,
    params: Params,
    inputs: Mapping[str, Any],
    limit: Int[Array, ""],
    key: Key[Array, "*rows"],
) -> Int[Array, "rows new"]:
    """All tokens: at most `limit` per row, fewer once every row has ended."""
    state = start(language, options, new, params, inputs, key)
    return _finish(language, options, params, state, limit).out


def run_each(
    language: Language,
    options: Options,
    new: int,
    params: Params,
    inputs: Mapping[str, Any],
    limit: Int[Array, ""],
    keys: Key[Array, "draws rows"],
) -> Int[Array, "draws rows new"]:
    """Several answers to each prompt, whose images are seen once: what `run` gives with each row of keys."""
    read = prefill(language, params, inputs, new)

    def one(key: Key[Array, " rows"]) -> Int[Array, "rows new"]:
        return _finish(language, options, params, begin(options, new, inputs, read, key), limit).out

    return jax.lax.map(one, keys)


def _finish(
    language: Language, options: Options, params: Params, state: State, limit: Int[Array, ""]
) -> State:
    """Go on until each row has ended or has `limit` tokens."""

    def going(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.done.all()

    return jax.lax.while_loop(going, lambda state: step(language, options, params, state), state)
