"""A permutation of a range, made by a key: each value by itself, forward and back, without a table of all."""

from collections.abc import Callable
from math import isqrt

import numpy as np

from shards.hashing import hash_array

ROUNDS = 10  # fewer show: with 6, neighbours lie at one distance of 16 a seventh too often


class Permutation:
    """Permutes ``range(size)`` by a Feistel network: O(sqrt(size)) to make and to keep, O(1) a value.

    A value is a pair, left * b + right with left below a and right below b. Each round adds a hash of one half to
    the other, modulo a or b, which can be undone. a * b may be a little more than the size: what comes out too large
    is sent through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: "cycle walking").

    Args:
        size: How many values, 1 at least.
        prefix: Key of the permutation, from ``hash_int``.
    """

    def __init__(self, size: int, prefix: int):
        self._size = size
        self._a = isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        rounds, halves = np.arange(ROUNDS, dtype=np.uint64), np.arange(self._a, dtype=np.uint64)
        hashes = hash_array(prefix, rounds[:, None], halves)  # [rounds, a]; b is a or less
        self._added = [
            (row % np.uint64(self._b if number % 2 else self._a)).astype(np.int64) for number, row in enumerate(hashes)
        ]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return what stands at each of int64 [n]."""
        return self._walk(values, self._forward)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Return where each of int64 [n] stands."""
        return self._walk(values, self._back)

    def _walk(self, values: np.ndarray, once: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        values = once(values)
        while len(outside := np.flatnonzero(values >= self._size)):
            values[outside] = once(values[outside])
        return values

    def _forward(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._b)
        for number, added in enumerate(self._added):
            if number % 2:
                right = (right + added[left]) % self._b
            else:
                left = (left + added[right]) % self._a
        return left * self._b + right

    def _back(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._b)
        for number, added in reversed(list(enumerate(self._added))):
            if number % 2:
                right = (right - added[left]) % self._b
            else:
                left = (left - added[right]) % self._a
        return left * self._b + right
