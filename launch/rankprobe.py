"""What every rank of a job can do, before it starts: host, clock, matrix products, all-reduce and links. Collective."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from launch.local import run_ranks
from launch.machines import NVIDIA, software
from pipeline import distributed, provenance
from pipeline.ceiling import rank_flops
from pipeline.hostmemory import free_memory
from shards.errors import PatchmillError, UserError

REDUCED = {"cpu": 2**22, "cuda": 2**26}  # values of float32 that are summed over all ranks: 17 and 268 MB
EXCHANGED = {"cpu": 2**22, "cuda": 2**24}  # values of float32 that two ranks send each other: 17 and 67 MB
ROUNDS = {"reduce": 5, "exchange": 10}  # others may use the machine, too, and two ranks alone meet them more often


def check_card(nvidia: Path = NVIDIA) -> None:
    """Check, before ranks meet, that this one can use its card: on its CPU, the others would wait for it in vain.

    Args:
        nvidia: What is there where there is a card.

    Raises:
        UserError: It cannot.
    """
    for each in software(nvidia):
        if each.state == "error" and distributed.world_size() > 1:
            raise UserError(f"{each.told} (rank {distributed.rank()} on {_host()})")


def probe_ranks() -> list[dict[str, Any]]:
    """Return what each rank measured, in rank order, as plain JSON values.

    ``host``; ``versions``; ``device``, in words; ``free``, bytes of its host's memory; ``clock``, in seconds since
    1970, read right after all ranks met; ``product``, operations a second of square matrix products in float32, ranks
    of a machine all at once; ``reduce``, bytes a second that each rank sends in an all-reduce, 2 (R - 1) / R of the
    tensor, or None of a single rank; ``links``, pairs of another rank and the bytes a second to it and from it.
    """
    device, hosts = distributed.device(), distributed.everyone(_host())
    found = {
        "host": _host(), "versions": provenance.versions(), "free": free_memory(), "clock": _clock(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "product": rank_flops("float32"), "reduce": _reduce(device), "links": _links(device, hosts),
    }  # fmt: skip
    return distributed.everyone(found)


def started_to_probe(ranks: int) -> list[dict[str, Any]]:
    """Start so many ranks on this machine for ``probe_ranks``; return what they measured.

    At most one a card, or one a core where there is no card: by hand that may be a login node, of a plan for 512 ranks.

    Raises:
        PatchmillError: They ended otherwise; why is on stderr.
    """
    ranks = min(ranks, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    with TemporaryDirectory() as logs:
        code, told = run_ranks(["probe"], ranks, Path(logs))
    if code:
        raise PatchmillError(f"the {ranks} ranks that were to be probed ended with exit code {code}; see above")
    return json.loads(told)


def _host() -> str:
    """Return the name of this machine, in a job that by which Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _clock() -> float:
    dist.barrier()  # the first makes connections
    dist.barrier()
    return time.time()


def _reduce(device: torch.device) -> float | None:
    ranks = distributed.world_size()
    if ranks == 1:
        return None
    values = torch.zeros(REDUCED[device.type], device=device)
    seconds = _best(lambda: dist.all_reduce(values), device, ROUNDS["reduce"])
    return 2 * (ranks - 1) / ranks * values.nbytes / seconds


def _links(device: torch.device, hosts: list[str]) -> list[tuple[int, float]]:
    """Return the speed of exchanges with both neighbours: an all-reduce ends for all ranks together, a pair alone."""
    mine, other = (torch.zeros(EXCHANGED[device.type], device=device) for _ in range(2))
    found = []
    for pairs in pairings(hosts):
        dist.barrier()
        for pair in pairs:
            if distributed.rank() in pair:
                peer = sum(pair) - distributed.rank()
                seconds = _best(partial(_exchange, mine, other, peer), device, ROUNDS["exchange"])
                found.append((peer, mine.nbytes / seconds))
    return found


def _exchange(mine: torch.Tensor, other: torch.Tensor, peer: int) -> None:
    both = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, other, peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def pairings(hosts: list[str]) -> Iterator[list[tuple[int, int]]]:
    """Yield pairs of ranks that exchange at the same time, until each had both its neighbours in a ring.

    The ring goes from host to host wherever there are several, so that every rank's way out of its own is measured.

    Args:
        hosts: Of each rank.
    """
    ranks = len(hosts)
    ring = sorted(range(ranks), key=lambda rank: hosts[:rank].count(hosts[rank]))
    links = [tuple(sorted((rank, ring[(place + 1) % ranks]))) for place, rank in enumerate(ring)]
    links = links[:1] if ranks == 2 else links if ranks > 2 else []
    even = ranks - ranks % 2  # the last link of an odd ring touches both the first and the last but one
    yield from filter(None, (links[:even:2], links[1:even:2], links[even:]))


def _best(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the seconds of the quickest of some rounds, the first of which is not counted."""
    work()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    took = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - began)
    return min(took)
