"""Every sample of a data set exactly once, over any number of ranks."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from shards.augment import Transform
from shards.batch import Work, host_array
from shards.dataset import Dataset
from shards.meter import Meter
from shards.order import rank_positions


class EvaluationBatch(NamedTuple):
    """As ``Batch``, with ``valid``, bool [n]: False in rows that only fill up the last batch."""

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    valid: np.ndarray


class EvaluationLoader:
    """Every sample exactly once over all ranks, in as many batches on each; iterate it as often as you like.

    Args:
        dataset: Single-label samples.
        batch: Samples a batch of each rank.
        transform: Makes squares of images.
        rank: Of this process.
        world_size: Number of ranks.
        threads: That decode.
        prefetch: Batches made ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        *,
        transform: Transform,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        prefetch: int = 2,
    ):
        self.dataset, self.batch, self.transform = dataset, batch, transform
        self.rank, self.world_size, self.threads, self.prefetch = rank, world_size, threads, prefetch

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.dataset) // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[EvaluationBatch]:
        """Yield the batches.

        Raises:
            DecodeError: A sample cannot be decoded; scores are never of fewer samples than they say.
        """
        step = self.batch * self.world_size
        starts = iter(range(0, len(self.dataset), step))
        ahead: deque[Work] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            while True:
                while len(ahead) <= self.prefetch and (start := next(starts, None)) is not None:
                    ahead.append(self._begin(pool, rank_positions(start, step, self.rank, self.world_size)))
                if not ahead:
                    return
                work = ahead.popleft()
                if broken := work.wait():
                    raise broken[0].error
                valid = work.positions < len(self.dataset)
                yield EvaluationBatch(work.images, work.labels, work.positions, valid)
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, positions: np.ndarray) -> Work:
        ends = np.cumsum(self.dataset.shard_sizes)
        real = positions[positions < len(self.dataset)]
        shard = np.searchsorted(ends, real, side="right")
        index = real - (ends - self.dataset.shard_sizes)[shard]
        epoch = np.zeros_like(positions)
        return Work(pool, Meter(), host_array, self.dataset.read, self.transform, 0, positions, epoch, shard, index)
