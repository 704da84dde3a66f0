"""The next token: scores as transformers' processors change them, in their order, and the choice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmjax.decode.options import Options

Scores = Float[Array, "rows vocab"]


def penalized(scores: Scores, seen: Bool[Array, "rows vocab"], penalty: float) -> Scores:
    """Scores with those of tokens that were seen made worse."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def top_k(scores: Scores, k: int) -> Scores:
    """-inf below the k-th largest score; what equals it stays."""
    least = jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]
    return jnp.where(scores < least, -jnp.inf, scores)


def top_p(scores: Scores, p: float, least: int = 1) -> Scores:
    """-inf outside the smallest set of likeliest tokens that holds probability p, or `least` of them.

    Of equal scores those with the larger ids stay.
    """
    order = jnp.argsort(scores, axis=-1, stable=True)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1)), axis=-1)
    places = jnp.arange(scores.shape[-1])[None, :]
    out = (below <= 1 - p) & (places < scores.shape[-1] - least)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(out).at[rows, order].set(out), -jnp.inf, scores)


def adjusted(
    options: Options, scores: Scores, seen: Bool[Array, "rows vocab"] | None, step: Int[Array, ""]
) -> Scores:
    """Scores of the token after `step` new ones, after all that the options ask for."""
    if seen is not None:
        scores = penalized(scores, seen, options.repetition_penalty)
    if options.min_new_tokens and options.eos_token_ids:
        early = scores.at[:, jnp.asarray(options.eos_token_ids)].set(-jnp.inf, mode="drop")
        scores = jnp.where(step < options.min_new_tokens, early, scores)
    if not options.do_sample:
        return scores
    # Beams need enough tokens to go on with after those that end a row.
    least = max(2, 1 + len(options.eos_token_ids)) if options.num_beams > 1 else 1
    if options.temperature != 1.0:
        scores = scores / options.temperature
    if options.top_k:
        scores = top_k(scores, max(options.top_k, least))
    return top_p(scores, options.top_p, least) if options.top_p < 1.0 else scores


def choose(
    options: Options,
    scores: Scores,
    seen: Bool[Array, "rows vocab"] | None,
    step: Int[Array, ""],
    key: Key[Array, "*rows"],
) -> Int[Array, " rows"]:
    """The likeliest token of each row after `step` new ones, or one drawn by `key`, its own or the one of all."""
    scores = adjusted(options, scores, seen, step)
    if options.do_sample:
        draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
        return draw(key, scores).astype(jnp.int32)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def seen_in(
    options: Options, ids: Int[Array, "rows tokens"], mask: Int[Array, "rows tokens"], vocab: int
) -> Bool[Array, "rows vocab"] | None:
    """Which tokens each prompt has; None where nobody asks. Padding does not count, nor an id beyond the vocabulary."""
    if options.repetition_penalty == 1.0:
        return None
    seen = jnp.zeros((ids.shape[0], vocab), bool)
    ids = jnp.where(mask != 0, ids, vocab)
    return seen.at[jnp.arange(ids.shape[0])[:, None], ids].set(True, mode="drop")


def also_seen(
    seen: Bool[Array, "rows vocab"] | None, tokens: Int[Array, " rows"]
) -> Bool[Array, "rows vocab"] | None:
    """With one more token per row."""
    return None if seen is None else seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)


def ends(options: Options, out: Int[Array, "rows new"], step: Int[Array, ""]) -> Bool[Array, " rows"]:
    """Whether the tokens out[:, :step + 1] end with one that ends a row, or with a stop sequence."""
    last = jax.lax.dynamic_slice_in_dim(out, step, 1, axis=1)[:, 0]
    done = jnp.zeros(last.shape, bool)
    for token in options.eos_token_ids:
        done = done | (last == token)
    for sequence in options.stop_sequences:
        if len(sequence) <= out.shape[1]:
            start = step - (len(sequence) - 1)
            found = jax.lax.dynamic_slice_in_dim(out, jnp.maximum(start, 0), len(sequence), axis=1)
            done = done | ((found == jnp.asarray(sequence)[None, :]).all(axis=1) & (start >= 0))
    return done
