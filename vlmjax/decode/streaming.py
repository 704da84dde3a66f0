"""`stream`: tokens as they are made, the same ones that `generate` gives; and their text, for a person who reads."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from vlmjax.decode import loop
from vlmjax.decode.generation import opened
from vlmjax.decode.language import Language, Params
from vlmjax.decode.options import Options
from vlmjax.decode.prompts import bucket
from vlmjax.errors import UserError

_Step = tuple[loop.State, Int[Array, " rows"], Bool[Array, ""]]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(language: Language, options: Options, new: int, *arguments: Any) -> _Step:
    return _shown(loop.start(language, options, new, *arguments))


# The state is given up for the next one: its cache is written in place, not copied for every token.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _next(language: Language, options: Options, params: Params, state: loop.State) -> _Step:
    return _shown(loop.step(language, options, params, state))


def _shown(state: loop.State) -> _Step:
    last = jax.lax.dynamic_slice_in_dim(state.out, state.step - 1, 1, axis=1)[:, 0]
    return state, last, state.done.all()


def stream(
    model: nn.Module, params: Params, *, max_new_tokens: int, seed: int = 0, **inputs_and_options: Any
) -> Iterator[np.ndarray]:
    """Continue prompts, one token per row at a time: int32 [batch] each, padding after the end of a row.

    Arguments and errors are those of `generate`, which gives the same tokens; beams cannot be streamed, since what is
    best is known only at the end. Errors come at once, before the first token is asked for.
    """
    language, options, inputs = opened(model, params, max_new_tokens, inputs_and_options)
    if options.num_beams > 1:
        raise UserError(
            f"num_beams is {options.num_beams}: beams cannot be streamed; give 1, or use generate"
        )
    key = jax.random.key(seed)
    step = _start(language, options, bucket(max_new_tokens), params, inputs, key)
    return _tokens(language, options, params, step, max_new_tokens)


def _tokens(
    language: Language, options: Options, params: Params, step: _Step, limit: int
) -> Iterator[np.ndarray]:
    for count in range(1, limit + 1):
        state, tokens, done = step
        # The device is asked for the next token before the host looks at this one: neither waits for the other.
        step = _next(language, options, params, state) if count < limit else step
        yield np.asarray(jax.device_get(tokens))
        if jax.device_get(done):
            return


class TextStream:
    """Tokens to text piece by piece: no half of a character, nothing of a stop string.

    Attributes:
      text: all that was given out.
      stopped: whether a stop string came, which is not given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Iterable[str] = ()):
        """`decode` makes text of tokens, so that more tokens only add to it once characters are whole."""
        self._decode, self._stops = decode, tuple(stop_strings)
        self._ids: list[int] = []
        self._before = self._read = 0
        self._held = self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token brings, perhaps none yet."""
        self._ids.append(int(token))
        # Decoded with some tokens before it: tokenizers treat the first word of a text in their own way.
        known, now = (
            self._decode(self._ids[self._before : self._read]),
            self._decode(self._ids[self._before :]),
        )
        if now.endswith("\ufffd") or len(now) <= len(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return self._give(now[len(known) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        known, now = (
            self._decode(self._ids[self._before : self._read]),
            self._decode(self._ids[self._before :]),
        )
        self._before = self._read = len(self._ids)
        out = self._give(now[len(known) :])
        rest, self._held = ("" if self.stopped else self._held), ""
        self.text += rest
        return out + rest

    def _give(self, more: str) -> str:
        if self.stopped:
            return ""
        held = self._held + more
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self.stopped, out, self._held = True, held[: min(found)], ""
        else:
            keep = max((_begun(held, stop) for stop in self._stops), default=0)
            out, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def words(
    tokens: Iterable[int], decode: Callable[[Sequence[int]], str], stop_strings: Iterable[str] = ()
) -> Iterator[str]:
    """Text of one row as it comes, up to a stop string, at which no more tokens are taken."""
    out = TextStream(decode, stop_strings)
    for token in tokens:
        if piece := out.push(token):
            yield piece
        if out.stopped:
            return
    if piece := out.end():
        yield piece
