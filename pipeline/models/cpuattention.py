"""Self-attention in bfloat16 on the CPU, whose backward pass is matrix products of whole images.

The forward pass is PyTorch's fused one. Its backward pass takes two (197 tokens) to eight times (37) the time of what
is here, on an AMD EPYC with AVX-512; what is here computes the weights of attention again, and holds those of a layer.
In float32 PyTorch's own is quicker.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

LEAST = 2**14
"""Multiply-adds of a product: with fewer, what Python does around it costs more than is saved."""

MOST = 640
"""Tokens: with more, PyTorch's own is as fast, and the weights of attention outgrow the activations."""


def pays(qkv: Tensor) -> bool:
    """Tell whether ``attention`` is to be taken for [n, T, 3, h, d]."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype == torch.bfloat16
        and qkv.shape[1] <= MOST
        and qkv.numel() // 3 * qkv.shape[1] >= LEAST
        and torch.is_grad_enabled()
        and qkv.requires_grad
        and not torch.compiler.is_compiling()  # the compiler cannot look into it
        and not isinstance(qkv, FakeTensor)  # memory is estimated for the fused kernels
    )


def attention(qkv: Tensor) -> Tensor:
    """Return what heads see: queries, keys and values [n, T, 3, h, d], next to each other -> [n, T, h * d]."""
    return _Attention.apply(qkv)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))  # each [n, h, T, d]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        n, t, _, h, d = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, n * h, t, d).unbind(0)
        grad = grad.view(n, t, h, d).transpose(1, 2).reshape(n * h, t, d)
        scale = d**-0.5
        q = q * scale
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)  # [n * h, T, T], of each query a row
        of_v = torch.bmm(weights.transpose(1, 2), grad)
        of_weights = torch.bmm(grad, v.transpose(1, 2))
        of_logits = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_q = torch.bmm(of_logits, k).mul_(scale)
        of_k = torch.bmm(of_logits.transpose(1, 2), q)
        found = torch.empty_like(qkv)
        for part, each in enumerate((of_q, of_k, of_v)):
            found[:, :, part] = each.view(n, h, t, d).transpose(1, 2)
        return found
