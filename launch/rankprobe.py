"""What every rank of a job can do, before it starts: host, clock, matrix products and all-reduce. Collective."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from launch.local import run_ranks
from pipeline import distributed
from shards.errors import PatchmillError

REDUCED = {"cpu": 2**22, "cuda": 2**26}  # values of float32 that are summed over all ranks: 17 and 268 MB
SIDES = {"cpu": 1024, "cuda": 8192}
ROUNDS = 5


def probe_ranks() -> list[dict[str, Any]]:
    """Return what each rank measured, in rank order: ``host``, ``clock``, ``device``, ``product`` and ``reduce``.

    ``clock`` is in seconds since 1970, read right after all ranks met; ``product`` in operations a second of a square
    matrix product in float32, ranks of a machine all at once; ``reduce`` in bytes a second that each rank sends in an
    all-reduce, 2 (R - 1) / R of the tensor, or None of a single rank.
    """
    device = distributed.device()
    product = _product(device)
    found = {
        "host": socket.gethostname(), "clock": _clock(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "product": product, "reduce": _reduce(device),
    }  # fmt: skip
    return distributed.everyone(found)


def started_to_probe(ranks: int) -> list[dict[str, Any]]:
    """Start so many ranks on this machine for ``probe_ranks``, and return what they measured.

    Raises:
        PatchmillError: They ended otherwise; why is on stderr.
    """
    with TemporaryDirectory() as logs:
        code, told = run_ranks(["probe"], ranks, Path(logs))
    if code:
        raise PatchmillError(f"the {ranks} ranks that were to be probed ended with exit code {code}; see above")
    return json.loads(told)


def _clock() -> float:
    dist.barrier()  # the first makes connections
    dist.barrier()
    return time.time()


def _product(device: torch.device) -> float:
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    torch.mm(a, b)
    dist.barrier()
    return 2 * side**3 / _best(lambda: torch.mm(a, b), device)


def _reduce(device: torch.device) -> float | None:
    ranks = distributed.world_size()
    if ranks == 1:
        return None
    values = torch.zeros(REDUCED[device.type], device=device)
    dist.all_reduce(values)
    seconds = _best(lambda: dist.all_reduce(values), device)
    return 2 * (ranks - 1) / ranks * values.nbytes / seconds


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the quickest of some rounds: others may use the machine, too."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    took = []
    for _ in range(ROUNDS):
        wait()
        began = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - began)
    return min(took)
