"""How fast this machine multiplies matrices: what the utilisation of a run is measured against."""

import time

import torch
import torch.distributed as dist

from pipeline import distributed

SIDES = {"cpu": 1024, "cuda": 8192}
ROUNDS = 3


def product_flops(precision: str) -> float:
    """Return the operations a second of square matrix products on all ranks at once; collective.

    Args:
        precision: "float32", "bfloat16" or "float16".
    """
    device = distributed.device()
    side = SIDES[device.type]
    # Random numbers: a GPU draws less power for equal ones, and keeps a higher clock than training ever sees.
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, precision)) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.mm(a, b)
    dist.barrier()  # ranks may share cores
    best = float("inf")
    for _ in range(ROUNDS):
        wait()
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - began)
    return sum(distributed.gather_floats([2 * side**3 / best])[:, 0])
