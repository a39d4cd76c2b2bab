"""Histograms against numpy on all the numbers at once."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.histogram import Histogram

NUMBERS = st.lists(st.integers(0, 1 << 17) | st.integers(0, 1 << 45), min_size=1, max_size=60)


def filled(*parts: list[int]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.array(part, np.int64))
    return histogram


@given(NUMBERS, NUMBERS)
def test_percentiles_are_exact_below_and_near_above(one, other):
    histogram = filled(one, other)
    values = np.array(one + other)
    assert (histogram.total, histogram.sum) == (len(values), sum(one + other))
    for percent in (0, 5, 25, 50, 75, 95, 100):
        right = int(np.percentile(values, percent, method="nearest"))
        found = histogram.percentile(percent)
        assert found == right if right < 1 << 17 or percent in (0, 100) else right * (1 - 2**-16) <= found <= right


@given(NUMBERS)
def test_bars_hold_every_number_once(numbers):
    bars = filled(numbers).bars()
    assert len(bars) <= 32
    assert sum(bar.count for bar in bars) == len(numbers)
    assert bars[0].low <= min(numbers)
    assert max(numbers) < bars[-1].high
    small = [bar for bar in bars if bar.high <= 1 << 17]
    assert [bar.count for bar in small] == [sum(bar.low <= x < bar.high for x in numbers) for bar in small]
    assert all(one.high == other.low for one, other in pairwise(bars))


def test_memory_is_bounded_whatever_comes():
    histogram = Histogram()
    for power in range(10, 50):
        histogram.add(np.random.default_rng(power).integers(0, 1 << power, 10_000))
    assert histogram._counts.nbytes < 20e6


def test_nothing_has_no_bars():
    assert filled([]).bars() == []
