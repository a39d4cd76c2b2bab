"""What happens to a model block by block: activations computed again, torch.compile, weights gathered together."""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.config import EngineSettings
from shards.errors import UserError

BLOCK = re.compile(r"(stages\.\d+\.|decoder\.)?blocks\.\d+")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's blocks in their order: an encoder's, then those of MAE's decoder; of a ResNet its units."""
    return [module for name, module in model.named_modules() if BLOCK.fullmatch(name)]


def prepare_blocks(model: nn.Module, settings: EngineSettings) -> None:
    """Make blocks compute their activations again in the backward pass, and compile them, as the settings say.

    A block alone is compiled: what an engine does around it, such as gathering its weights, breaks no graph, and blocks
    that are alike are compiled once.
    """
    blocks = blocks_of(model)
    if not blocks and (settings.recompute_every or settings.compile):
        key = "recompute_every" if settings.recompute_every else "compile"
        raise UserError(f"engine.{key} is of blocks, and {type(model).__name__} has none; unset it")
    compiler = os.environ.get("CXX", "g++")
    if settings.compile and shutil.which(compiler) is None:
        raise UserError(
            f"engine.compile wants the C++ compiler {compiler}, and it is not here; install it, or unset it"
        )
    for number, block in enumerate(blocks):
        if settings.compile:
            block.forward = torch.compile(block.forward)
        if settings.recompute_every and number % settings.recompute_every == 0:
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)  # draws the same random numbers again
