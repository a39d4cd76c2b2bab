"""The process group: who am I, and how do all ranks agree. Ranks come from RANK, WORLD_SIZE and LOCAL_RANK."""

import datetime
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.liveness import Liveness
from shards.atomic import only_one
from shards.errors import PatchmillError, StoppedOnRequestError, UserError

TIMEOUT = datetime.timedelta(minutes=10)  # of joining, and of collectives where no watchdog watches
WATCHED = datetime.timedelta(days=14)  # more than any watchdog's; in milliseconds still an int32
alive: Liveness | None = None  # signs of life of the ranks, where there are several
_beside: dist.ProcessGroup | None = None


def rank() -> int:
    """Return this process's rank; 0 when it runs alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks; 1 when this process runs alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Return the device of this rank: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start() -> None:
    """Join the process group (gloo on CPU, NCCL on CUDA); a lone process makes a group of one.

    Raises:
        UserError: There are several ranks and no MASTER_ADDR, or fewer GPUs than ranks of this machine.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        settle_on_card(torch.cuda.device_count())
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if "MASTER_ADDR" not in os.environ:
        if world_size() > 1:
            raise UserError(
                f"WORLD_SIZE is {world_size()}, but MASTER_ADDR is not set; start the ranks with a launcher"
            )
        # An in-memory store needs no port that another run could hold.
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=TIMEOUT)
    if where.type == "cuda":
        claim_card(str(torch.cuda.get_device_properties(where).uuid), dist.distributed_c10d._get_default_store())


def settle_on_card(cards: int) -> None:
    """Let LOCAL_RANK be the number of this rank's card, by which DeepSpeed and Accelerate go, too.

    A rank that sees a single one has that, as under torchrun's --virtual-local-rank: ``srun --gpus-per-task=1`` and
    ``--gpu-bind=single:1`` show each its own. That it is, ``claim_card`` finds when the ranks have met.

    Args:
        cards: That this rank sees.

    Raises:
        UserError: It is none of several.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cards == 1:
        # DeepSpeed wants both to be the same.
        os.environ |= {name: "0" for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if name in os.environ}
    elif local >= cards:
        raise UserError(
            f"rank {rank()} is number {local}, from 0, of {socket.gethostname()}, and sees {cards} GPUs; start one "
            "rank a GPU there, and let each see all of them, or its own alone"
        )


def claim_card(card: str, store: dist.Store) -> None:
    """Take a card for this rank alone.

    Args:
        card: What no other has: its UUID.
        store: Of all ranks.

    Raises:
        UserError: Another rank has it.
    """
    first = store.compare_set(f"card {card}", "", str(rank())).decode()
    if first != str(rank()):
        raise UserError(
            f"ranks {first} and {rank()} on {socket.gethostname()} have the same GPU ({card}); start one rank a GPU "
            "there, and let each see all of them, or its own alone"
        )


def group_beside() -> dist.ProcessGroup:
    """Return the group (gloo) over which threads beside the loop agree; collective at the first call."""
    global _beside
    if _beside is None:
        _beside = dist.new_group(backend="gloo")
    return _beside


def let_collectives_take_long() -> None:
    """Let those of all groups there are (DeepSpeed makes some of its own) wait for more than 10 minutes.

    In a training stage ``watchdog``, which could not be longer else, sees hangs then. The store keeps its own timeout.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(WATCHED, group)


def finish() -> None:
    """Leave the process group; call it when the engine is out of scope."""
    global _beside
    _beside = None
    if dist.is_initialized():
        # A DistributedDataParallel that outlives its group keeps gloo's threads running, and a joinable thread at
        # interpreter exit aborts the process (seen in 1 of 9 runs).
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Join the process group for as long as it is open; where a rank ends by an error or dies, all end, told which."""
    start()
    who = f"rank {rank()} on {socket.gethostname()}, process {os.getpid()},"
    store = dist.distributed_c10d._get_default_store()
    global alive
    with Liveness(store, rank(), world_size(), who) if world_size() > 1 else nullcontext() as alive:
        try:
            yield
        except StoppedOnRequestError:
            _leave()
            raise
        _leave()  # not after an error: those who will not come would be waited for


def _leave() -> None:
    dist.barrier()  # rank 0 has the store, which the signs of life of the others need
    finish()


def memory_bytes() -> int:
    """Return the memory of this rank: the most that tensors on its GPU took, or what is resident now without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return the element-wise sum of ``values`` over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def gather_floats(values: list[float]) -> np.ndarray:
    """Return every rank's ``values``, float64 [ranks, values]; collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=device())
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyones, mine)
    return torch.stack(everyones).cpu().numpy()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, the same bits on each; on the device, so the host does not wait."""
    value = value / world_size()
    dist.all_reduce(value)
    return value


def everyone(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's ``obj``, in rank order, on every rank; ``group`` is another of the same ranks."""
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj, group)
    return gathered


def ranks_here() -> list[int]:
    """Return the ranks on this machine; collective."""
    hosts = everyone(socket.gethostname())
    return [number for number, host in enumerate(hosts) if host == hosts[rank()]]


def cores_each() -> int:
    """Return how many cores each rank of this machine has for itself, at least 1; collective.

    Whether its ranks may use all of them, or a launcher has bound each to its own.
    """
    everywhere = everyone((socket.gethostname(), os.sched_getaffinity(0)))
    here = [mine for host, mine in everywhere if host == everywhere[rank()][0]]
    return max(1, len(set().union(*here)) // len(here))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a stage's folder; ranks of a launcher that was killed get a minute to end."""
    with ExitStack() as stack:
        error = None
        if rank() == 0:
            try:
                stack.enter_context(only_one(folder, "training run", wait=60))
            except PatchmillError as problem:
                error = problem
        raise_together(error)
        yield


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error: a failure on one rank must never leave the others waiting."""
    errors = [e for e in everyone(error) if e is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
