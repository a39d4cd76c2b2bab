"""Which flat piece of which parameter a rank owns, and how pieces leave for a checkpoint and come back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.optim import state_kinds

Piece = tuple[str, str, int, Tensor]
"""(kind, parameter, start, flat float32 tensor): values [start, start + numel) of one flattened parameter's kind."""

Read = Callable[[str, str, int, int], Tensor]
"""read(kind, parameter, start, count) -> flat float32 tensor of ``count`` values."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was.

    Attributes:
        loss: Mean loss of this rank's samples, a detached float32 scalar on the device.
        grad_norm: Global gradient norm before clipping.
        applied: Whether the weights changed.
    """

    loss: Tensor
    grad_norm: float | Tensor
    applied: bool


@dataclass(frozen=True)
class Fragment:
    """Values [start, start + count) of a parameter, at ``offset`` of the flat fp32 tensor that the optimizer steps."""

    parameter: str
    start: int
    count: int
    master: Tensor
    offset: int

    def of(self, flat_like_master: Tensor) -> Tensor:
        """Return this fragment's view of the master, or of an optimizer state shaped like it."""
        return flat_like_master.detach().view(-1)[self.offset : self.offset + self.count]


def replicated(named: Iterator[tuple[str, nn.Parameter]], rank: int, world_size: int) -> Iterator[Fragment]:
    """Deal parameters that every rank holds whole: rank r owns the r-th of R even cuts of each."""
    for name, parameter in named:
        start = parameter.numel() * rank // world_size
        stop = parameter.numel() * (rank + 1) // world_size
        if stop > start:
            yield Fragment(name, start, stop - start, parameter, start)


def pieces(fragments: list[Fragment], optimizer: torch.optim.Optimizer, rank: int) -> Iterator[Piece]:
    """Yield what a checkpoint must hold of this rank: weights, optimizer states, and on rank 0 the step count."""
    kinds = state_kinds(optimizer)
    for fragment in fragments:
        yield "weight", fragment.parameter, fragment.start, fragment.of(fragment.master)
        state = optimizer.state[fragment.master]
        for kind in kinds:
            if state.get(kind) is not None:
                yield kind, fragment.parameter, fragment.start, fragment.of(state[kind])
    if rank == 0 and fragments:
        step = optimizer.state[fragments[0].master].get("step")
        if step is not None:
            yield "step", "optimizer", 0, step.detach().reshape(1).float()


@torch.no_grad()
def load_pieces(held: list[Fragment], optimizer: torch.optim.Optimizer, read: Read) -> None:
    """Fill masters and optimizer states from a checkpoint.

    Args:
        held: Everything this rank steps: what it owns, or, where every rank keeps a copy of everything, all of it.
        optimizer: The optimizer that steps the masters.
        read: Gives values of the checkpoint by kind, parameter and range.
    """
    for fragment in held:
        fragment.of(fragment.master).copy_(read("weight", fragment.parameter, fragment.start, fragment.count))
        state = optimizer.state[fragment.master]
        for kind in state_kinds(optimizer):
            if kind not in state:
                state[kind] = torch.zeros_like(fragment.master, memory_format=torch.preserve_format).detach()
            fragment.of(state[kind]).copy_(read(kind, fragment.parameter, fragment.start, fragment.count))
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = read("step", "optimizer", 0, 1).reshape(()).to(fragment.master.device)  # as fused wants it
