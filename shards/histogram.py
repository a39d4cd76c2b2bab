"""Counts of whole numbers, in memory that does not grow with how many there are."""

import math
from typing import NamedTuple

import numpy as np

EXACT_BITS = 17
"""Numbers below 2**17 are counted one by one, larger ones by their first 17 binary digits."""

BARS = 32  # at most, of a picture


class Bar(NamedTuple):
    """``count`` numbers are at least ``low`` and less than ``high``."""

    low: float
    high: float
    count: int  # type: ignore[assignment]  # of a tuple it is a method


class Histogram:
    """How often each number was seen. Exact below 131,072; larger ones are known to 1 part in 65,536.

    Attributes:
        total: How many numbers were added.
        sum: Their exact sum.
        least: The least of them, exact; None of none.
        greatest: The greatest, exact.
    """

    def __init__(self) -> None:
        self.total, self.sum = 0, 0
        self.least: int | None = None
        self.greatest: int | None = None
        self._counts = np.zeros(0, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count whole numbers, an integer array (n,) of values from 0 to 2**53."""
        if not len(values):
            return
        least, greatest = int(values.min()), int(values.max())
        self.least = least if self.least is None else min(self.least, least)
        self.greatest = greatest if self.greatest is None else max(self.greatest, greatest)
        self.total += len(values)
        self.sum += int(values.sum(dtype=np.int64))
        bins, counts = np.unique(_bin(values), return_counts=True)
        if bins[-1] >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(bins[-1] + 1 - len(self._counts), np.int64)])
        self._counts[bins] += counts

    def percentile(self, percent: float) -> int:
        """Return the number that stands at ``percent`` of the way through all, sorted: the nearest, no mean of two."""
        if self.least is None or self.greatest is None:
            raise ValueError("nothing was counted")
        if percent == 100:
            return self.greatest
        place = round((self.total - 1) * percent / 100)
        found = np.searchsorted(np.cumsum(self._counts), place, side="right")
        return max(int(_least(np.asarray(found))), self.least)

    def bars(self) -> list[Bar]:
        """Return at most 32 bars of equal ratio that hold all numbers, for numbers that spread by factors."""
        if self.least is None or self.greatest is None:
            return []
        low, high = math.log2(max(self.least, 1)), math.log2(max(self.greatest, 1) + 1)
        finer = next(each for each in (8, 4, 2, 1, 0.5) if (high - low) * each <= BARS - 2)
        steps = range(math.floor(low * finer), math.ceil(high * finer) + 1)
        edges = sorted({math.ceil(2 ** (step / finer)) for step in steps} | ({0} if self.least == 0 else set()))
        return self.bars_between(edges)

    def bars_between(self, edges: list[int]) -> list[Bar]:
        """Return the bars between sorted whole numbers."""
        places = np.searchsorted(_least(np.arange(len(self._counts))), edges)
        counted = np.concatenate([[0], np.cumsum(self._counts)])[places]
        return [Bar(low, high, int(n)) for low, high, n in zip(edges, edges[1:], np.diff(counted), strict=False)]


def _bin(values: np.ndarray) -> np.ndarray:
    """Return the bins of numbers: those of equal first 17 binary digits and equal length share one."""
    shift = np.maximum(np.frexp(values.astype(np.float64))[1] - EXACT_BITS, 0).astype(np.int64)
    return (shift << (EXACT_BITS - 1)) + (values.astype(np.int64) >> shift)


def _least(bins: np.ndarray) -> np.ndarray:
    """Return the least number of each bin."""
    shift = np.maximum((bins >> (EXACT_BITS - 1)) - 1, 0)
    return (bins - (shift << (EXACT_BITS - 1))) << shift
