"""Which steps are not taken: a loss or gradient norm that is not finite, or that leaps far above what came before.

The decision falls on the device, inside the engine's step, from numbers that all ranks have alike: so no rank waits
for it, and all decide the same.
"""

import math

import torch
from torch import Tensor

MEMORY = 0.99  # the running means look back on some 100 steps
ENOUGH = (1 - MEMORY**100) / (1 - MEMORY)  # what 100 steps count; with fewer nothing is judged by what came before
LEAST_DEVIATION = 0.1  # of a logarithm: at 8 sigmas nothing has leapt that is not 2.2 times the mean
TINY = 1e-12


class Guard:
    """Judges steps by how far the logarithms of loss and gradient norm are above their running means.

    What leaps is taken into the means as if it had come as far as is allowed: one outlier hardly moves them, and a
    lasting change, such as another learning rate on resume, is the new normal after a few steps.

    Args:
        sigmas: Standard deviations above the running mean that a step may be; 0: any finite number will do.
        device: Of the engine's losses.
    """

    def __init__(self, sigmas: float, device: torch.device):
        self._sigmas = sigmas or math.inf
        # Fading sums over the steps of 1, x and x * x, x being the logarithm of loss and of gradient norm: [3, 2].
        self._sums = torch.zeros(3, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return whether a step is not to be taken, a bool scalar on the device, from its two float scalars."""
        values = torch.stack([loss.detach().double(), torch.as_tensor(grad_norm).to(loss.device).double()])
        finite = values.isfinite()
        logs = values.nan_to_num().clamp(min=TINY).log()  # [2]
        count, first, second = self._sums
        mean = first / count.clamp(min=1)
        deviation = (second / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt().clamp(min=LEAST_DEVIATION)
        limit = torch.where(count >= ENOUGH, mean + self._sigmas * deviation, math.inf)
        counted = logs.minimum(limit)
        faded = MEMORY * self._sums + torch.stack([torch.ones_like(counted), counted, counted.square()])
        self._sums = torch.where(finite, faded, self._sums)
        return ~finite.all() | (logs > limit).any()

    def state_dict(self) -> dict[str, list]:
        """Return what it remembers, for a checkpoint."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, list] | None) -> None:
        """Go on with what a checkpoint remembers; one from before there was a guard remembers nothing."""
        if state is not None:
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
