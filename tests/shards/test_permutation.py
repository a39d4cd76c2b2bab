import tracemalloc

import numpy as np
import pytest

from shards.hashing import hash_int
from shards.permutation import Permutation


@pytest.mark.parametrize("sizes", [range(1, 130), [1000, 4095, 4096, 4097, 99_991]])
def test_every_value_once_and_back_again(sizes):
    for size in sizes:
        permutation, values = Permutation(size, hash_int(size)), np.arange(size)
        found = permutation(values)
        assert sorted(found.tolist()) == values.tolist()
        assert permutation.inverse(found).tolist() == values.tolist()


@pytest.mark.parametrize("size", [5, 16, 100])
def test_is_as_even_as_chance(size):
    """Over many keys each value comes to each place, and neighbours to each distance, as often as any other."""
    keys = 4_000
    cells, distances = np.zeros((size, size)), np.zeros(size)
    for key in range(keys):
        found = Permutation(size, hash_int(key))(np.arange(size))
        cells[np.arange(size), found] += 1
        distances += np.bincount(np.diff(found) % size, minlength=size)
    assert _deviation(cells, keys / size, (size - 1) ** 2) < 4
    assert _deviation(distances[1:], keys, size - 2) < 4


def _deviation(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Return how many standard deviations the counts are less even than chance makes them, by chi-square."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_billions_cost_no_table_of_all():
    tracemalloc.start()
    permutation = Permutation(10**11, 7)
    values = np.arange(5, 10**11, 10**9)
    assert permutation.inverse(permutation(values)).tolist() == values.tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def test_keys_differ():
    found = [Permutation(1000, hash_int(key))(np.arange(1000)) for key in (1, 2)]
    assert (found[0] == found[1]).sum() < 10
