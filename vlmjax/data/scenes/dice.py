"""Random choices that are the same on every machine, Python and numpy version.

Philox's 64-bit words are part of numpy's compatibility promise, the methods of `Generator` are not: the
words are turned into choices here, by exact integer arithmetic.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """A stream of choices that depends on `(seed, stream, index, purpose)` only."""

    def __init__(self, seed: int, stream: int, index: int, purpose: int = 0):
        """Open the stream; two streams that differ in any argument are independent."""
        key = np.array([seed % 2**64, stream], np.uint64)
        # The lowest counter word is what the generator itself advances.
        counter = np.array([0, index, purpose, 0], np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = self._bits.random_raw(96).tolist()
        return self._words.pop()

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return (self._word() * n) >> 64

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases."""
        return self.below(100) < percent

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self._word() >> 11) * 2.0**-53)

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]

    def pick_weighted(self, options: Sequence[T], weights: Sequence[int]) -> T:
        """One of `options`, with integer weights."""
        left = self.below(sum(weights))
        for option, weight in zip(options, weights, strict=True):
            left -= weight
            if left < 0:
                return option
        raise AssertionError("weights must not be negative")

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All of `options` in random order."""
        result = list(options)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result
