"""How fast this machine multiplies matrices: what the utilisation of a run is measured against."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import distributed
from pipeline.models import onednn

SIDES = {"cpu": 1024, "cuda": 8192}
ROUNDS = 3


def products(device: torch.device, precision: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Return the ways in which our models multiply matrices: PyTorch's, and where it is not oneDNN's, that one too."""
    both = device.type == "cpu" and precision == "float32" and onednn.is_available()
    return [torch.mm, onednn.product] if both else [torch.mm]


def product_flops(precision: str) -> float:
    """Return the operations a second of square matrix products, the fastest way, on all ranks at once; collective.

    Args:
        precision: "float32", "bfloat16" or "float16".
    """
    return sum(distributed.gather_floats([rank_flops(precision)])[:, 0])


def rank_flops(precision: str) -> float:
    """Return those of this rank alone, while all others multiply too; collective."""
    device = distributed.device()
    side = SIDES[device.type]
    # Random numbers: a GPU draws less power for equal ones, and keeps a higher clock than training ever sees.
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, precision)) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for multiply in products(device, precision):
        multiply(a, b)
        dist.barrier()  # ranks may share cores
        for _ in range(ROUNDS):
            wait()
            began = time.perf_counter()
            multiply(a, b)
            wait()
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
