"""Which flat piece of which parameter a rank owns, and how pieces leave for a checkpoint and come back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.optim import state_kinds
from shards.errors import UserError

Piece = tuple[str, str, int, Tensor]
"""(kind, parameter, start, flat float32 tensor): values [start, start + numel) of one flattened parameter's kind."""

Read = Callable[[str, str, int, int], Tensor]
"""read(kind, parameter, start, count) -> flat float32 tensor of ``count`` values, or a MissingPieceError."""


class MissingPieceError(UserError):
    """A checkpoint does not hold what is asked of it."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was.

    Attributes:
        loss: Mean loss of all ranks' samples, a detached float32 scalar on the device, the same on every rank.
        grad_norm: Global gradient norm before clipping.
        applied: Whether the weights changed, a 0-d bool on the device, the same on every rank.
    """

    loss: Tensor
    grad_norm: float | Tensor
    applied: Tensor


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


AtHand = Callable[[Tensor], AbstractContextManager]
"""Brings a master and its states to where they can be read and written, for as long as it is open."""


def pieces(
    fragments: Iterable[Fragment],
    optimizer: torch.optim.Optimizer,
    rank: int,
    averages: dict[Tensor, Tensor],
    at_hand: AtHand = nullcontext,
) -> Iterator[Piece]:
    """Yield what a checkpoint must hold of this rank: weights, optimizer states, and on rank 0 the step count.

    Args:
        fragments: What this rank owns.
        optimizer: Steps the masters.
        rank: This one.
        averages: Of each master the moving average, kind ``ema``; none where it is not kept.
        at_hand: Of each master.
    """
    kinds, steps = state_kinds(optimizer), rank == 0 and isinstance(optimizer, torch.optim.AdamW)
    for master, parts in _by_master(fragments).items():
        with at_hand(master):
            state = optimizer.state[master]
            for part in parts:
                yield "weight", part.parameter, part.start, part.of(master)
                for kind in kinds:
                    yield kind, part.parameter, part.start, part.of(state[kind])
                if averages:
                    yield "ema", part.parameter, part.start, part.of(averages[master])
            if steps:  # all count the same
                yield "step", "optimizer", 0, state["step"].detach().reshape(1).float()
                steps = False


def begin_states(master: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's states as its first step would: a first step that is held back leaves them like this."""
    state = optimizer.state[master]
    for kind in state_kinds(optimizer):
        state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), device=master.device)  # where and what the fused one wants it


@torch.no_grad()
def load_pieces(
    held: Iterable[Fragment],
    optimizer: torch.optim.Optimizer,
    read: Read,
    averages: dict[Tensor, Tensor],
    at_hand: AtHand = nullcontext,
) -> None:
    """Fill masters, optimizer states and averages from a checkpoint; averages that it lacks begin as the weights.

    Args:
        held: Everything this rank steps: what it owns, or, where every rank keeps a copy of everything, all of it.
        optimizer: Steps the masters.
        read: Gives values of the checkpoint by kind, parameter and range.
        averages: As in ``pieces``.
        at_hand: Of each master.
    """
    for master, parts in _by_master(held).items():
        with at_hand(master):
            state = optimizer.state[master]
            for part in parts:
                where = part.parameter, part.start, part.count
                part.of(master).copy_(read("weight", *where))
                for kind in state_kinds(optimizer):
                    part.of(state[kind]).copy_(read(kind, *where))
                if averages:
                    try:
                        part.of(averages[master]).copy_(read("ema", *where))
                    except MissingPieceError:
                        part.of(averages[master]).copy_(part.of(master))
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"].copy_(read("step", "optimizer", 0, 1).reshape(()))


def _by_master(fragments: Iterable[Fragment]) -> dict[Tensor, list[Fragment]]:
    found: dict[Tensor, list[Fragment]] = {}
    for fragment in fragments:
        found.setdefault(fragment.master, []).append(fragment)
    return found
