"""First values: of each parameter a function of the seed and of its full name, whatever the ranks and the sharding.

The module that owns a parameter says how it begins: ``module.begin`` has a function for each of its own parameters,
such as those of ``layers.py``, which fills the memory it is given.
"""

import hashlib
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def initial_value(model: nn.Module, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the first value of one parameter, a pure function of the arguments.

    Args:
        model: the model, on any device, ``meta`` among them; its values are not read.
        name: full name, such as "blocks.0.attn.qkv.weight".
        shape: full shape, before any sharding.
        seed: seed of the run; each parameter has its own stream, from a hash of (seed, name).

    Returns:
        A float32 CPU tensor of that shape.

    Raises:
        ValueError: the name is not one of this model's.
    """
    path, _, kind = name.rpartition(".")
    owner: Any = None  # a module, which has ``begin``
    with suppress(AttributeError):
        owner = model.get_submodule(path)
    if owner is None or kind not in owner._parameters:
        raise ValueError(f"no such parameter in a {type(model).__name__}: {name}")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return owner.begin[kind](torch.empty(shape, dtype=torch.float32, device="cpu"), generator)


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Write the first value of every parameter of an unsharded model, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model, name, tuple(parameter.shape), seed))
