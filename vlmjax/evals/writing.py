"""Answers to prompts with images, on every device of a mesh and from every process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt32

from vlmjax.decode import beams, loop
from vlmjax.decode.generation import row_keys
from vlmjax.decode.language import language_of
from vlmjax.decode.options import Options
from vlmjax.decode.prompts import bucket, check_room
from vlmjax.models.blip_tasks import BlipVqa
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, local_rows, replicated, to_global


class Writer:
    """A model that writes, as one compiled function for each bucket of prompt length and of new tokens.

    Rows are split over the mesh's batch axes, parameters stay where they are; every process receives all answers.
    """

    def __init__(self, model: Any, transform: Any, mesh: jax.sharding.Mesh):
        """`model` is one that `decode.generate` takes; `transform` its own EvalTransform, with `mean` and `std`."""
        self.mesh, self._language = mesh, language_of(model)
        self._asks = isinstance(model, BlipVqa)
        language = self._language

        @on_mesh(mesh)
        def write(options: Options, new: int, limit: int, params: Any, inputs: Mapping[str, Array]) -> Array:
            pixels = normalized(inputs["pixel_values"], transform.mean, transform.std)
            given = {name: value for name, value in inputs.items() if name != "seeds"} | {
                "pixel_values": pixels
            }
            given = model.asked(**given) if self._asks else given
            given = language, options, new, params, given
            most = jnp.full((), limit, jnp.int32)
            if options.num_beams > 1:
                return beams.run(*given, most, jax.random.key(0))
            if inputs["seeds"].ndim == 1:
                return loop.run(*given, most, row_keys(inputs["seeds"]))
            return loop.run_each(*given, most, jax.vmap(row_keys)(inputs["seeds"].T))

        self._write = jax.jit(write, static_argnums=(0, 1, 2), out_shardings=replicated(mesh))

    def rows_per_batch(self, wanted: int) -> int:
        """`wanted`, rounded up to a multiple of the batch shards."""
        shards = batch_shards(self.mesh)
        return -(-wanted // shards) * shards

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        length: int,
        pixels: UInt8[np.ndarray, "own *slots height width 3"],
        batch_size: int,
        *,
        max_new_tokens: int,
        ends: tuple[int, ...],
        pad: int,
        seeds: UInt32[np.ndarray, " own *draws"] | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "*draws prompts new"]:
        """Continue a batch of prompts: once, or with several seeds of a row as often.

        Args:
          params: on the mesh.
          prompts: at most `batch_size`, int32 ids of at most `length` tokens, the same on every process.
          length: to compile for, see `batches`.
          pixels: of this process's rows, not normalised.
          batch_size: rows over all devices.
          max_new_tokens: of each answer.
          ends: tokens that end an answer.
          pad: the token after its end.
          seeds: of this process's rows, where answers are drawn.
          options: others of `decode.Options`, greedy without.
        """
        # Of a question the answer is no continuation: it begins with a token of its own.
        check_room(1 if self._asks else max(map(len, prompts)), max_new_tokens, self._language.room(params))
        ids = np.full((batch_size, length), pad, np.int32)
        mask = np.zeros((batch_size, length), np.int32)
        mask[:, 0] = 1  # a row without a prompt still needs a token
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        own = local_rows(self.mesh, batch_size)
        rows = slice(own.start, own.stop)
        seeds = np.zeros(len(own), np.uint32) if seeds is None else seeds
        local = {"input_ids": ids[rows], "attention_mask": mask[rows], "pixel_values": pixels, "seeds": seeds}
        chosen = Options(eos_token_ids=ends, pad_token_id=pad, **options)
        inputs = to_global(local, self.mesh, batch_size)
        out = self._write(chosen, bucket(max_new_tokens), max_new_tokens, params, inputs)
        return np.asarray(out)[..., : len(prompts), :max_new_tokens]


def until(ids: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Tokens of an answer up to the first that ends it."""
    return ids[: int(np.argmax(np.append(np.isin(ids, ends), True)))]


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Prompts in batches of like length: (tokens to compile for, which of them), the shorter ones first.

    Args:
      lengths: tokens of each prompt.
      batch_size: prompts of a batch, at most.
    """
    for wanted in sorted({bucket(length) for length in lengths}):
        alike = [place for place, length in enumerate(lengths) if bucket(length) == wanted]
        for start in range(0, len(alike), batch_size):
            yield wanted, alike[start : start + batch_size]
