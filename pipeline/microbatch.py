"""A rank's batch in the parts that go through the model at once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shards.hashing import hash_int


class MicroBatch(NamedTuple):
    """What goes through the model at once: what the objective prepared, n of each, and what dropouts draw."""

    inputs: tuple[Tensor, ...]
    draws: Tensor
    seed: int


def micro_batches(batch: tuple[Tensor, ...], size: int, seed: int, samples: int, rank: int) -> Iterator[MicroBatch]:
    """Cut a rank's batch, whose last tensor are stochastic depth's draws, into parts of ``size`` samples.

    Dropout is seeded by (seed, samples consumed before the step, rank, micro-batch): the same on the same shape of run.
    """
    for i in range(0, len(batch[0]), size):
        *inputs, draws = (tensor[i : i + size] for tensor in batch)
        yield MicroBatch(tuple(inputs), draws, hash_int(seed, samples, rank, i))


def seed_dropout(seed: int) -> None:
    """Seed the generators of the CPU and of this rank's GPU, as ``torch.manual_seed`` does.

    That one formats the Python stack for devices not yet in use, which takes longer than a small model's forward pass.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
