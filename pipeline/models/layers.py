"""Layers that more than one model is made of, and how their parameters begin.

A layer here is born without values, so that building ViT-H costs no random numbers. Its ``begin`` says how each of its
parameters begins, and ``initial.py`` makes them one by one: by a function of the memory to fill and of a generator;
``functools.partial`` sets what else it takes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models import onednn
from shards.errors import UserError

Fill = Callable[[Tensor, torch.Generator], Tensor]

# Standard deviation of a standard normal cut at +-2: what flax's lecun_normal divides by.
TRUNCATED_STD = 0.87962566


def zeros(value: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with zeros."""
    return value.zero_()


def ones(value: Tensor, generator: torch.Generator) -> Tensor:
    """Fill with ones."""
    return value.fill_(1.0)


def constant(value: Tensor, generator: torch.Generator, number: float) -> Tensor:
    """Fill with one number."""
    return value.fill_(number)


def normal(value: Tensor, generator: torch.Generator, std: float) -> Tensor:
    """Fill from a normal distribution around 0, not truncated."""
    return value.normal_(0, std, generator=generator)


def lecun_normal(value: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a kernel [outputs, inputs, ...] from a normal of variance 1 / fan-in cut at two deviations, as flax does."""
    std = math.prod(value.shape[1:]) ** -0.5 / TRUNCATED_STD
    return nn.init.trunc_normal_(value, 0, std, -2 * std, 2 * std, generator=generator)


def xavier_uniform(value: Tensor, generator: torch.Generator, parts: int = 1) -> Tensor:
    """Fill a kernel [..., outputs, inputs] uniformly by fan-in and fan-out; ``parts`` layers may be stacked in it."""
    limit = math.sqrt(6 / (value.shape[-1] + value.shape[-2] // parts))
    return value.uniform_(-limit, limit, generator=generator)


def head_fill(head_bias: float | str, num_classes: int) -> Fill:
    """Return how the bias of a classifier of K classes begins: a number, or "log_prior", which is -ln K.

    Raises:
        UserError: another word.
    """
    if head_bias == "log_prior":
        return partial(constant, number=-math.log(num_classes))
    if isinstance(head_bias, str):
        raise UserError(f"unknown head_bias: {head_bias!r}; give a number or 'log_prior'")
    return partial(constant, number=head_bias)


class Linear(nn.Linear):
    """A linear layer; ``bias=None`` leaves the bias out."""

    def __init__(self, inputs: int, outputs: int, *, weight: Fill, bias: Fill | None = zeros):
        super().__init__(inputs, outputs, bias=bias is not None)
        self.begin = {"weight": weight, "bias": bias}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        if onednn.pays(x, self.weight):
            return onednn.linear(x, self.weight, self.bias)
        return super().forward(x)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Conv2d(nn.Conv2d):
    """A convolution; ``bias=None`` leaves the bias out, and ``settings`` go to ``nn.Conv2d``."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, weight: Fill, bias: Fill | None = zeros, **settings: Any
    ):
        super().__init__(inputs, outputs, size, bias=bias is not None, **settings)
        self.begin = {"weight": weight, "bias": bias}

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class LayerNorm(nn.LayerNorm):
    """A layer norm, which begins as the identity; its epsilon is flax's unless another is given."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)
        self.begin = {"weight": ones, "bias": zeros}


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, embed_dim: int, mlp_dim: int, gelu: str, dropout: float):
        super().__init__()
        tiny = partial(normal, std=1e-6)
        self.fc1 = Linear(embed_dim, mlp_dim, weight=xavier_uniform, bias=tiny)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = Linear(mlp_dim, embed_dim, weight=xavier_uniform, bias=tiny)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D], through [n, T, M]."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
