"""Whether a step is taken: decided on the device, after the last gradient and before anything changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Guard = Callable[[Tensor, Tensor], Tensor]
"""guard(loss, norm) -> 0-d bool, all on the device: the mean loss over all ranks, the global gradient norm before
clipping; True holds the step back. It is asked once a step, on every rank, and must answer the same on all of them."""


class Gate:
    """Holds steps back whose gradient norm is not finite, and those that the guard does not want.

    torch's fused optimizers leave weights, states and step count alone where their ``found_inf`` is 1, as they do for
    torch's own loss scaling. It is a tensor on the device, so the host never waits for the answer.

    Args:
        optimizer: A fused one, that of torch under the engine's.
        guard: Asked besides, if there is one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, guard: Guard | None):
        self._guard = guard
        optimizer.register_step_pre_hook(self._tell)

    def close(self, loss: Tensor, norm: Callable[[], float | Tensor]) -> None:
        """Begin a step's end: the loss is known, and the norm will be when the optimizer steps."""
        self._loss, self._norm = loss, norm
        self._held: Tensor | None = None

    def held(self) -> Tensor:
        """Return whether this step is held back, a 0-d bool on the device; asks the guard at the first call."""
        if self._held is None:
            # The norm of an offloaded gradient is on the CPU, and where DeepSpeed held the step back it is a float.
            norm = torch.as_tensor(self._norm(), dtype=torch.float32, device=self._loss.device)
            self._held = ~torch.isfinite(norm)
            if self._guard is not None:
                self._held = self._held | self._guard(self._loss, norm)
        return self._held

    def _tell(self, optimizer: Any, *_: object) -> None:
        # DeepSpeed steps one optimizer several times, for one group of parameters each. Where those are in host memory
        # and the answer is on a GPU it is waited for here: torch's copy of it would not be.
        where = [parameter.device for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.found_inf = self.held().float().to(where[0] if where else self._loss.device)
