"""The shuffle window in memory: only of remote shards that no cache on disk keeps, and checked before a run starts."""

from math import gcd

from pipeline import distributed
from pipeline.datasettings import DataSettings
from pipeline.hostmemory import free_memory
from shards.dataset import Dataset
from shards.errors import UserError
from shards.mixture import Mixture
from shards.order import Shuffle

EDGES = 1.5
"""Chunks in memory over the window: those that lie across the edges of blocks, and those read ahead."""


def window_of_rank(shuffle: Shuffle, mean_bytes: float, ranks: int) -> float:
    """Return the bytes of the window that a rank holds; a lane is read by all ranks whose positions lie in it."""
    return EDGES * shuffle.window * mean_bytes / gcd(ranks, shuffle.lanes)


def check_window(dataset: Dataset | Mixture, data: DataSettings, seed: int) -> None:
    """Raise a UserError where the window does not fit into a machine's free memory; collective over all ranks."""
    ranks, wanted, error = distributed.world_size(), 0.0, None
    here = len(distributed.ranks_here())
    if not data.cache:
        order = dataset.order(seed, data.window_bytes)
        for each, part in zip(dataset.datasets, order.orders, strict=True):
            if not each.local.all():
                wanted += here * window_of_rank(part.shuffle, each.mean_bytes, ranks)
    if wanted > (free := free_memory()):
        error = UserError(
            f"the shuffle window of {data.window_bytes / 1e9:.1f} GB takes {wanted / 1e9:.1f} GB of this machine's "
            f"memory, and {free / 1e9:.1f} GB are free; make data.window_bytes smaller, or set data.cache to a disk"
        )
    distributed.raise_together(error)
