"""The pace of matrix products that the utilisation of a run is measured against."""

import time

import numpy as np
import pytest
import torch

from pipeline import ceiling, distributed
from pipeline.ceiling import product_flops
from pipeline.models import onednn

SIDE = 128


@pytest.fixture(autouse=True)
def _small(monkeypatch, alone):
    monkeypatch.setattr(ceiling, "SIDES", dict.fromkeys(ceiling.SIDES, SIDE))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_of_this_machine_and_in_the_precision(monkeypatch, precision):
    multiply, seen = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append((a.dtype, a.shape, b.shape)) or multiply(a, b))
    assert 1e6 < product_flops(precision) < 1e16
    assert set(seen) == {(getattr(torch, precision), (SIDE, SIDE), (SIDE, SIDE))}
    assert len(seen) == 1 + ceiling.ROUNDS  # the first, which is not timed, warms up


def test_both_ways_are_products_of_the_same_numbers():
    a, b = torch.randn(5, 3), torch.randn(3, 7)
    ways = ceiling.products(torch.device("cpu"), "float32")
    assert len(ways) == 1 + onednn.is_available()  # PyTorch's own is MKL then, which an AMD's cores are slower with
    for multiply in ways:
        assert multiply(a, b).numpy() == pytest.approx(a.numpy() @ b.numpy(), rel=1e-5, abs=1e-6)
    assert ceiling.products(torch.device("cpu"), "bfloat16") == [torch.mm]


def slow(waits: list[float]):
    """Return a product that takes a little longer, call by call."""
    left = iter(waits)

    def multiply(a, b):
        time.sleep(next(left))
        return a @ b

    return multiply


@pytest.mark.parametrize(("first", "second"), [([0.05, 0.3], [0.2, 0.4]), ([0.3, 0.2], [0.4, 0.05])])
def test_it_is_of_the_fastest_product_and_the_first_of_each_way_is_not_timed(monkeypatch, first, second):
    monkeypatch.setattr(ceiling, "products", lambda *_: [slow([0.0, 0.5, *first]), slow([0.0, 0.5, *second])])
    took = 2 * SIDE**3 / product_flops("float32")
    assert 0.05 <= took < 0.2


def test_it_is_the_sum_over_ranks(monkeypatch):
    gather, paces = distributed.gather_floats, []

    def of_two(values):
        paces.extend(values)
        return np.repeat(gather(values), 2, axis=0)

    monkeypatch.setattr(distributed, "gather_floats", of_two)
    assert product_flops("float32") == pytest.approx(2 * paces[0])
