"""Loss scaling: float16 has so few small numbers that gradients must be made larger, and then smaller again."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from pipeline.engines.fragments import MissingPieceError, Piece, Read


class LossScale:
    """A factor of the loss that halves when a gradient overflows, and doubles after many steps without.

    DeepSpeed's own, of ``torch_autocast``, clips scaled gradients and changes once for every group of parameters.

    Attributes:
        value: The factor.
    """

    FIRST, LARGEST, STEPS = 2.0**16, 2.0**24, 2000

    def __init__(self) -> None:
        self.value, self._good = self.FIRST, 0

    def update(self, overflowed: bool) -> None:
        """Tell how a step ended."""
        self._good = 0 if overflowed else self._good + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self._good % self.STEPS == 0:
            self.value = min(self.value * 2, self.LARGEST)

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide gradients by the factor, in place."""
        torch._foreach_mul_([each.grad for each in parameters if each.grad is not None], 1 / self.value)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """Yield what a checkpoint must hold: rank 0 the factor, and the good steps since it changed."""
        if rank == 0:
            yield "loss_scale", "optimizer", 0, torch.tensor([self.value, float(self._good)])

    def load(self, read: Read) -> None:
        """Go on from a checkpoint; one of another precision has no factor."""
        with suppress(MissingPieceError):
            value, good = read("loss_scale", "optimizer", 0, 2).tolist()
            self.value, self._good = value, int(good)
