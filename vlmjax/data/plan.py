"""The order of the data: which example stands in which row of which batch, as a function of (seed, step)."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

_MASK64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 4


def mix64(*values: int) -> int:
    """Fold integers into one well-mixed unsigned 64-bit number (splitmix64, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + (value & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of [0, n) that belongs to (seed, epoch) sends each `index`.

    A balanced Feistel network over the smallest even number of bits that holds n - 1, walked again where it
    leaves the range: a bijection of any size that needs no table, so position 10^9 costs the same as position
    0.

    Args:
        index: integers in [0, n), any shape.
        n: size of the permuted set, at least 1.
        seed: the run's seed.
        epoch: which pass over the data; each has an order of its own.

    Returns:
        int64 array of the shape of `index`.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix64(seed, epoch, n, r)) for r in range(_ROUNDS)]
    values = np.asarray(index).astype(np.uint64)
    out = _feistel(values, half, low, keys)
    outside = out >= n
    while outside.any():
        out[outside] = _feistel(out[outside], half, low, keys)
        outside = out >= n
    return out.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, low: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left, right = values >> half, values & low
    for key in keys:
        left, right = right, left ^ (_scramble(right, key) & low)
    return np.atleast_1d((left << half) | right).reshape(values.shape)


def _scramble(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit hash of x under a key; array multiplication wraps silently, which is wanted."""
    x = (x + key) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(32))


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The whole order of one epoch: int64 [n], each of 0..n-1 once."""
    return permute(np.arange(n), n, seed, epoch)


def example_rng(seed: int, position: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of the example at one global position, whoever decodes it and whenever.

    Philox is counter-based (Salmon et al. 2011): the position goes in the high words of the counter, so no
    two positions ever share a draw.
    """
    key = mix64(seed, 0x76_6C_6D, stream)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position & _MASK64, 0]))


class Generators:
    """`example_rng` for position after position, at a twentieth of its cost: one generator per thread, reset."""

    def __init__(self, seed: int, stream: int = 0):
        """Arguments as of `example_rng`."""
        self._seed, self._stream = seed, stream
        self._mine = threading.local()

    def at(self, position: int) -> np.random.Generator:
        """The generator of a position; good until this thread asks for another."""
        mine = self._mine
        if not hasattr(mine, "generator"):
            mine.generator = example_rng(self._seed, 0, self._stream)
            mine.state = mine.generator.bit_generator.state
        mine.state["state"]["counter"][:] = (0, 0, position & _MASK64, 0)
        mine.generator.bit_generator.state = mine.state
        return mine.generator

    def __reduce__(self):
        """Worker processes make their own."""
        return Generators, (self._seed, self._stream)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of one batch: the unit of work of a worker.

    `start` is the first row inside the host's part of the batch; `positions` are global positions in the run,
    `indices` the examples that stand there.
    """

    step: int
    start: int
    positions: np.ndarray
    indices: np.ndarray

    @property
    def rows(self) -> slice:
        """The rows of the host's part of the batch that it fills."""
        return slice(self.start, self.start + len(self.indices))


class ByStep:
    """What every order of chunks has in common, for a frozen dataclass with `rows`, `start_step` and `chunk`.

    Pickled by its fields, so that another process works out the rest for itself.
    """

    rows: range
    start_step: int
    chunk: int

    def __getstate__(self) -> dict[str, Any]:
        """Its fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From `__getstate__`."""
        self.__init__(**state)

    @property
    def chunks_per_batch(self) -> int:
        """How many chunks make this host's part of one batch."""
        return -(-len(self.rows) // self.chunk)

    def __len__(self) -> int:
        """Endless for every purpose; a sequence has to have a length."""
        return 2**48

    def _where(self, item: int) -> tuple[int, int, range]:
        """(step, number in its batch, rows of the global batch) of chunk `item`, counted from `start_step`."""
        step, part = divmod(int(item), self.chunks_per_batch)
        return step + self.start_step, part, self.rows[part * self.chunk : (part + 1) * self.chunk]


@dataclasses.dataclass(frozen=True)
class Plan(ByStep):
    """Random access to the chunks of one host, from `start_step` on, without end.

    Global position g = step * batch_size + row shows example `order(g)`. A host owns the contiguous `rows` of
    every global batch, so the global batch does not depend on the number of hosts.
    """

    order: Callable[[np.ndarray], np.ndarray]  # int64 positions -> int64 examples: see mixture.Mixture
    batch_size: int
    rows: range
    start_step: int = 0
    chunk: int = 32

    def indices(self, step: int) -> np.ndarray:
        """The example in every row of the global batch of a step: int64 [batch_size]."""
        return self.order(step * self.batch_size + np.arange(self.batch_size, dtype=np.int64))

    def __getitem__(self, item: int) -> Chunk:
        """Chunk number `item` of this host, counted from `start_step`."""
        step, part, rows = self._where(item)
        positions = step * self.batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)
        return Chunk(step, part * self.chunk, positions, self.order(positions))
