"""A moving (Polyak) average of the weights, sharded as the fp32 weights are, which an engine's optimizer steps."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24
"""Values that ``exchange`` moves at once: what it needs of memory."""


class Ema:
    """After every step ``average += (1 - decay) * (weight - average)``; a step that was held back changes nothing.

    Args:
        optimizer: Steps the masters; it may do so in several calls, each for some of them.
        decay: Share of the average that a step keeps; None: there is no average.

    Attributes:
        averages: Of each master its average, where the master is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float | None):
        self.averages: dict[Tensor, Tensor] = {}
        self._decay = decay
        if decay is not None:
            optimizer.register_step_post_hook(self._follow)

    def begin(self, master: Tensor) -> None:
        """Start at a master's weights as they are."""
        if self._decay is not None:
            self.averages[master] = master.detach().clone()

    @torch.no_grad()
    def _follow(self, optimizer: Any, *_: object) -> None:
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        if masters and self._decay is not None:
            # A tensor, not a number: whether the step was held back (``found_inf``) is known on the device alone.
            share = ((1 - self._decay) * (1 - optimizer.found_inf)).to(masters[0].device)
            torch._foreach_lerp_([self.averages[master] for master in masters], masters, [share] * len(masters))

    @torch.no_grad()
    def exchange(self, master: Tensor) -> None:
        """Let a master and its average, if there is one, change places, with no copy of either."""
        if master not in self.averages:
            return
        one, other = (tensor.detach().view(-1) for tensor in (master, self.averages[master]))
        for a, b in zip(one.split(CHUNK), other.split(CHUNK), strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
