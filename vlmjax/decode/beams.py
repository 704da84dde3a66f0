"""Beam search with the rules of transformers 5 (generation/utils.py, `_beam_search`): several hypotheses per row.

Each step extends every running hypothesis by every token and looks at the best (1 + stop tokens, at least 2) *
num_beams of these. Those that have ended are finished, if they are among the best num_beams, with their score divided
by length**length_penalty; the best num_beams of the others run on. A row is over once its best running hypothesis, by
the same rule at its present length, is no better than its worst finished one (`early_stopping=False`); or once
num_beams have finished (True); or once it could not win even at the full length ("never", with a length_penalty above
0). At the length limit everything has finished.

Known differences from transformers: padding after the end is always `pad_token_id` (transformers takes the first stop
token where that is 0); a repetition penalty does not count padding of the prompt; with stop sequences more
hypotheses are looked at, so that enough of them run on.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from vlmjax.decode import choosing
from vlmjax.decode.language import Language, Params, advance, prefill
from vlmjax.decode.options import Options
from vlmjax.models.cache import Cache

# Below every sum of log-probabilities, and finite: differences of two of them are not NaN.
_NEVER = -1.0e9


@struct.dataclass
class Beams:
    """Where a search stands.

    Attributes:
      running, scores: hypotheses that go on, best first, with their sums of log-probabilities.
      finished, marks, ended: the best that have ended, with their scores; `ended` is False for an empty place.
      open: rows whose finished hypotheses can still be beaten.
      over: whether every candidate of the last step had ended.
      prompt: slots of the cache that all hypotheses of a row have in common.
    """

    cache: Cache
    running: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]
    finished: Int[Array, "batch beams new"]
    marks: Float[Array, "batch beams"]
    ended: Bool[Array, "batch beams"]
    open: Bool[Array, "batch 1"]
    over: Bool[Array, ""]
    positions: Int[Array, " rows"]
    seen: Bool[Array, "rows vocab"] | None
    step: Int[Array, ""]
    key: Key[Array, ""]
    prompt: int = struct.field(pytree_node=False)


def run(
    language: Language,
    options: Options,
    new: int,
    params: Params,
    inputs: Mapping[str, Any],
    limit: Int[Array, ""],
    key: Key[Array, ""],
) -> Int[Array, "batch new"]:
    """The best hypothesis of each row, of at most `limit` tokens."""
    cache, logits, positions = prefill(language, params, inputs, new)
    batch, beams, vocab = logits.shape[0], options.num_beams, logits.shape[1]
    blank = jnp.full((batch, beams, new), options.pad_token_id, jnp.int32)
    never = jnp.full((batch, beams), _NEVER, jnp.float32)
    seen = choosing.seen_in(options, inputs["input_ids"], inputs["attention_mask"], vocab)
    state = Beams(
        cache=repeat_rows(cache, beams),
        running=blank,
        # All hypotheses of a row are alike at first: only one of them may be extended.
        scores=never.at[:, 0].set(0.0),
        finished=blank,
        marks=never,
        ended=jnp.zeros((batch, beams), bool),
        open=jnp.ones((batch, 1), bool),
        over=jnp.zeros((), bool),
        positions=jnp.repeat(positions, beams),
        seen=None if seen is None else jnp.repeat(seen, beams, axis=0),
        step=jnp.zeros((), jnp.int32),
        key=key,
        prompt=cache.slots - new,
    )
    state = _select(options, state, jnp.repeat(logits, beams, axis=0), limit)

    def going(state: Beams) -> Bool[Array, ""]:
        full = state.ended.all() & (options.early_stopping is True)
        return state.open.any() & ~full & ~state.over

    def step(state: Beams) -> Beams:
        last = jax.lax.dynamic_slice_in_dim(state.running, state.step - 1, 1, axis=2).reshape(-1)
        logits, cache = advance(language, params, last, state.positions, state.cache)
        return _select(options, state.replace(cache=cache, positions=state.positions + 1), logits, limit)

    return jax.lax.while_loop(going, step, state).finished[:, 0]


def _select(
    options: Options, state: Beams, logits: Float[Array, "rows vocab"], limit: Int[Array, ""]
) -> Beams:
    """Extend the hypotheses by one token."""
    batch, beams = state.scores.shape
    vocab, count = logits.shape[1], state.step + 1
    gains = choosing.adjusted(options, jax.nn.log_softmax(logits), state.seen, state.step)
    totals = (gains.reshape(batch, beams, vocab) + state.scores[:, :, None]).reshape(batch, -1)
    scores, places = _candidates(options, totals, jax.random.fold_in(state.key, state.step))
    parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    candidates = jax.lax.dynamic_update_slice(
        _of(state.running, parents), tokens[:, :, None], (zero, zero, state.step)
    )
    over = choosing.ends(options, candidates.reshape(-1, candidates.shape[2]), state.step)
    over = over.reshape(scores.shape) | (count >= limit)
    state = _finish(options, state, candidates, scores, over, count)
    best, order = jax.lax.top_k(jnp.where(over, scores + _NEVER, scores), beams)
    rows = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(parents, order, axis=1)
    chosen = jnp.take_along_axis(tokens, order, axis=1).reshape(-1)
    seen = None if state.seen is None else state.seen[rows.reshape(-1)]
    state = state.replace(
        cache=take_rows(state.cache, rows.reshape(-1), state.prompt),
        running=_of(candidates, order),
        scores=best,
        over=over.all(),
        seen=choosing.also_seen(seen, chosen),
        step=count,
    )
    return state.replace(open=state.open & _can_win(options, state, limit))


def _candidates(
    options: Options, totals: Float[Array, "batch places"], key: Key[Array, ""]
) -> tuple[Float[Array, "batch candidates"], Int[Array, "batch candidates"]]:
    """The best extensions, best first; or as many drawn without replacement, sorted."""
    ways = len(options.eos_token_ids) + len(options.stop_sequences)
    count = max(2, 1 + ways) * options.num_beams
    count = min(count, totals.shape[1])
    if not options.do_sample:
        scores, best = jax.lax.top_k(totals, count)
        return scores, best
    # The largest of independently Gumbel-disturbed scores are a draw without replacement (arXiv:1903.06059).
    drawn = jax.lax.top_k(totals + jax.random.gumbel(key, totals.shape), count)[1]
    scores, order = jax.lax.top_k(jnp.take_along_axis(totals, drawn, axis=1), count)
    return scores, jnp.take_along_axis(drawn, order, axis=1)


def _finish(
    options: Options,
    state: Beams,
    candidates: Int[Array, "batch candidates new"],
    scores: Float[Array, "batch candidates"],
    over: Bool[Array, "batch candidates"],
    count: Int[Array, ""],
) -> Beams:
    """Keep the best of what had finished and what has now."""
    beams = options.num_beams
    just = over & (jnp.arange(scores.shape[1]) < beams)[None, :]
    full = state.ended.all(axis=1, keepdims=True) & (options.early_stopping is True)
    marks = scores / count.astype(jnp.float32) ** options.length_penalty
    marks = jnp.where(just & state.open & ~full, marks, _NEVER)
    marks, order = jax.lax.top_k(jnp.concatenate([state.marks, marks], axis=1), beams)
    return state.replace(
        finished=_of(jnp.concatenate([state.finished, candidates], axis=1), order),
        marks=marks,
        ended=jnp.take_along_axis(jnp.concatenate([state.ended, just], axis=1), order, axis=1),
    )


def _can_win(options: Options, state: Beams, limit: Int[Array, ""]) -> Bool[Array, "batch 1"]:
    """Whether a row's best running hypothesis could still be better than its worst finished one."""
    longest = options.early_stopping == "never" and options.length_penalty > 0
    length = limit if longest else state.step
    best = state.scores[:, :1] / length.astype(jnp.float32) ** options.length_penalty
    worst = jnp.where(state.ended, state.marks.min(axis=1, keepdims=True), _NEVER)
    return (best > worst).any(axis=1, keepdims=True)


def _of(
    x: Int[Array, "batch several new"], order: Int[Array, "batch chosen"]
) -> Int[Array, "batch chosen new"]:
    return jnp.take_along_axis(x, order[:, :, None], axis=1)


def repeat_rows(cache: Cache, times: int) -> Cache:
    """Each row several times, copies side by side. What they look at beside it (`cache.crossed`) they share."""
    return cache.replace(
        k=jnp.repeat(cache.k, times, axis=1),
        v=jnp.repeat(cache.v, times, axis=1),
        segment_ids=jnp.repeat(cache.segment_ids, times, axis=0),
        positions=jnp.repeat(cache.positions, times, axis=0),
    )


def take_rows(cache: Cache, rows: Int[Array, " rows"], common: int) -> Cache:
    """Rows in another order, which had the first `common` slots and all positions in common."""

    def moved(x: Float[Array, "layers rows heads slots head_dim"]) -> Array:
        # Only what differs is moved: the prompt, most of the cache, stays where it is.
        return jax.lax.dynamic_update_slice_in_dim(x, x[:, rows, :, common:], common, axis=3)

    return cache.replace(k=moved(cache.k), v=moved(cache.v))
