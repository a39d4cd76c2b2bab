"""oneDNN's linear layer beside PyTorch's: the same results and gradients, and only where it is to be taken."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.models import onednn
from pipeline.models.layers import Linear, lecun_normal, zeros
from tests.processor import HAS_BFLOAT16
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_same_as_pytorch(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((*shape, 6), (9, 6), (9,), (*shape, 9))
    )

    def results(linear, dtype):
        inputs = [each.to(dtype).requires_grad_() for each in ((x, weight, bias) if with_bias else (x, weight))]
        y = linear(*inputs, *([] if with_bias else [None]))
        return [y, *torch.autograd.grad(y, inputs, grad.to(dtype))]

    for ours, theirs in zip(results(onednn.linear, torch.float32), results(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 on this CPU")
@pytest.mark.parametrize("with_bias", [True, False])
def test_under_autocast_as_pytorch(with_bias):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*size, generator=generator) for size in ((2, 5, 48), (32, 48), (32,))][
        : 3 if with_bias else 2
    ]
    grad = torch.randn(2, 5, 32, generator=generator)

    def results(linear):
        inputs = [each.clone().requires_grad_() for each in values]
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(*inputs, *([] if with_bias else [None]))
        return [y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]

    for ours, theirs in zip(results(onednn.linear), results(F.linear), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)  # one rounding in eight bits apart
    assert results(onednn.linear)[0].dtype == torch.bfloat16


def test_gradients_of_what_wants_them_alone():
    weight, bias = torch.randn(4, 3), torch.randn(4, requires_grad=True)
    onednn.linear(torch.randn(2, 3), weight, bias).sum().backward()
    assert bias.grad.tolist() == [2, 2, 2, 2]
    assert weight.grad is None


def test_where_it_is_taken(monkeypatch):
    layer = Linear(256, 256, weight=lecun_normal, bias=zeros)

    def taken(x):
        return type(layer(x).grad_fn).__name__ == "_LinearBackward"

    assert taken(torch.randn(256, 256))
    assert taken(torch.randn(2, 128, 256))
    assert not taken(torch.randn(255, 256))  # too small
    with monkeypatch.context() as another_build:
        another_build.setattr(torch.ops, "mkldnn", SimpleNamespace())  # without the operator
        assert not taken(torch.randn(256, 256))
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(torch.randn(256, 256)) == HAS_BFLOAT16
        assert not taken(torch.randn(255, 256))
    with torch.autocast("cpu", torch.float16):
        assert not taken(torch.randn(256, 256))
    layer.to("meta")
    assert not taken(torch.empty(256, 256, device="meta"))


def test_under_zero_3():
    for found in run_on_ranks(Path(__file__).with_name("worker_onednn.py"), 2):
        ours, theirs = np.array(found).reshape(2, 2, 2)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert ours[0, 0] != ours[1, 0]
