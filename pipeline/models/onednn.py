"""Linear layers on the CPU in float32, by oneDNN: PyTorch itself takes it for bfloat16 alone, and MKL for float32.

On an AMD EPYC with AVX-512 the product with the weights, its bias, and the gradient of its inputs take a fifth to a
third less time; the gradient of the weights does not, and stays with MKL. (bench/train_step.py has the whole step.)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 2**24  # multiply-adds; with fewer, what Python does around the product costs more than is saved


def pays(x: Tensor, weight: Tensor) -> bool:
    """Tell whether ``linear`` is to be taken for inputs [..., inputs] and weights [outputs, inputs]."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not every build of PyTorch has it
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what ``torch.nn.functional.linear`` returns: [..., inputs] x [outputs, inputs] -> [..., outputs]."""
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The parameter itself is saved, not a view of its values: under ZeRO 3 those are elsewhere until the backward.
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # [rows, outputs]
        return (
            _product(grad, weight.t()) if of_x else None,
            flat.t() @ x.flatten(0, -2) if of_weight else None,
            flat.sum(0) if ctx.has_bias and of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
