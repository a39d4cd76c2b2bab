"""Linear layers on the CPU by oneDNN, called so that it adds the bias itself, in float32 and under bfloat16's autocast.

PyTorch takes MKL for float32; and for bfloat16 oneDNN, but writes the bias to the result first, and adds the product.
On an AMD EPYC with AVX-512 the forward product takes a tenth to a third less time in either precision, and in float32
so does the gradient of the inputs; other gradients stay as they are. (bench/train_step.py has the whole step.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 2**24  # multiply-adds; with fewer, what Python does around the product costs more than is saved

_used = ContextVar("used", default=True)


@contextmanager
def unused() -> Iterator[None]:
    """Leave linear layers to PyTorch meanwhile, as they are on a GPU."""
    token = _used.set(False)
    try:
        yield
    finally:
        _used.reset(token)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Tell whether ``linear`` is to be taken for inputs [..., inputs] and weights [outputs, inputs]."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses for itself, and cannot look into what follows
        and _used.get()
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= LEAST
        and _known(x, weight)
        and is_available()
    )


def is_available() -> bool:
    """Tell whether this build of PyTorch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _known(x: Tensor, weight: Tensor) -> bool:
    """Tell whether the product is one of float32 numbers, or one that autocast makes one of bfloat16 numbers."""
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype == weight.dtype == torch.float32
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices [n, k] and [k, m]: [n, m]."""
    return _called(a, b.t())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what ``torch.nn.functional.linear`` returns: [..., inputs] x [outputs, inputs] -> [..., outputs].

    Under autocast all three are rounded to bfloat16 first, and gradients after, as autocast itself does it.
    """
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        bias = None if bias is None else bias.to(torch.bfloat16)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The parameter itself is saved, not a view of its values: under ZeRO 3 those are elsewhere until the backward.
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _called(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # [rows, outputs]
        return (
            _of_inputs(grad, weight) if of_x else None,
            flat.t() @ x.flatten(0, -2) if of_weight else None,
            flat.sum(0) if ctx.has_bias and of_bias else None,
        )


def _of_inputs(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the inputs, [..., inputs], of one of the outputs, [..., outputs]."""
    return _called(grad, weight.t()) if grad.dtype == torch.float32 else grad @ weight


def _called(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
