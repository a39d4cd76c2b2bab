"""Memory for a copy of what a rank owns, kept from save to save: taking it anew would cost more than copying does."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.fragments import Piece

SLAB = 2**25
"""Values that are taken at once: 134 MB, in pages as large as the system has, and few enough to be pinned."""


class HostCopy:
    """A copy in host memory, pinned where it comes from a GPU."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []

    def reserve(self, values: int, device: torch.device) -> None:
        """Take the memory for so many values before there is anything to copy, for a copy from ``device``."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread, which else pins on the first one
            self._slabs = [_empty(SLAB, pinned=True) for _ in range(0, values, SLAB)]
        else:
            self._slabs = [_empty(values, pinned=False)]
            self._slabs[0].numpy().fill(0)  # the system gives memory when it is written to

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return copies of all pieces, written over those of the call before; waits until they are there."""
        copied, at, used, on_gpu = [], 0, 0, False
        for kind, name, start, tensor in pieces:
            count = tensor.numel()
            if at < len(self._slabs) and used + count > len(self._slabs[at]):
                at, used = at + 1, 0
            if at == len(self._slabs):
                self._slabs.append(_empty(max(SLAB, count), tensor.is_cuda))
            elif count > len(self._slabs[at]):  # a larger one than was here at the call before
                self._slabs[at] = _empty(count, tensor.is_cuda)
            mine = self._slabs[at][used : used + count]
            mine.copy_(tensor.detach().view(-1), non_blocking=True)
            copied.append((kind, name, start, mine))
            used, on_gpu = used + count, on_gpu or tensor.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied


def _empty(count: int, pinned: bool) -> Tensor:
    # NumPy asks the system for huge pages, PyTorch does not.
    return torch.empty(count, pin_memory=True) if pinned else torch.from_numpy(np.empty(count, np.float32))
