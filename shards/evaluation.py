"""Every sample of a data set exactly once, over any number of ranks.

A rank's batch is of samples that lie together, so on a remote store one request brings it.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from shards.augment import Transform
from shards.batch import Work, host_array
from shards.dataset import Dataset, Sample
from shards.manylabels import Accepts
from shards.meter import Meter


class EvaluationBatch(NamedTuple):
    """As ``Batch``, with ``valid``, bool [n]: False in rows that only fill up the last batch."""

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    valid: np.ndarray


class EvaluationLoader:
    """Every sample exactly once over all ranks, in as many batches on each; iterate it as often as you like.

    Args:
        dataset: Of the samples.
        batch: Samples a batch of each rank.
        transform: Makes squares of images.
        rank: Of this process.
        world_size: Number of ranks.
        threads: That decode.
        prefetch: Batches made ahead.
        labels: How many a sample may have, as for ``Loader``.
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
        labels: Accepts = "one",
    ):
        self._accepts = labels
        self.dataset, self.batch, self.transform = dataset, batch, transform
        self.rank, self.world_size, self.threads, self.prefetch = rank, world_size, threads, prefetch

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return -(-len(self.dataset) // (self.batch * self.world_size))

    def __iter__(self) -> Generator[EvaluationBatch]:
        """Yield the batches.

        Raises:
            DecodeError: A sample cannot be decoded; scores are never of fewer samples than they say.
        """
        starts = iter(range(0, len(self.dataset), self.batch * self.world_size))
        ahead: deque[Work] = deque()
        fetching = ThreadPoolExecutor(self.prefetch + 1, thread_name_prefix="fetch")
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        try:
            while True:
                while len(ahead) <= self.prefetch and (start := next(starts, None)) is not None:
                    ahead.append(self._begin(pool, fetching, start + self.rank * self.batch))
                if not ahead:
                    return
                work = ahead.popleft()
                if broken := work.wait():
                    raise broken[0].error
                valid = work.positions < len(self.dataset)
                yield EvaluationBatch(work.images, work.labels, work.positions, valid)
        finally:
            fetching.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, fetching: ThreadPoolExecutor, first: int) -> Work:
        positions = np.arange(first, first + self.batch)
        ends = np.cumsum(self.dataset.shard_sizes)
        real = positions[positions < len(self.dataset)]
        shard = np.searchsorted(ends, real, side="right")
        index = real - (ends - self.dataset.shard_sizes)[shard]
        read = self.dataset.read if self.dataset.local.all() else self._fetched(fetching, shard, index)
        epoch = np.zeros_like(positions)
        return Work(pool, Meter(), host_array, read, self.transform, 0, positions, epoch, shard, index, self._accepts)

    def _fetched(
        self, fetching: ThreadPoolExecutor, shard: np.ndarray, index: np.ndarray
    ) -> Callable[[int, int], Sample]:
        """Begin to read consecutive samples, those of a shard together; return what gives one when it is there."""
        shards, first, number = np.unique(shard, return_index=True, return_counts=True)
        parts = {
            s: (start, fetching.submit(self.dataset.read_many, s, start, start + n))
            for s, start, n in zip(shards.tolist(), index[first].tolist(), number.tolist(), strict=True)
        }

        def read(shard: int, index: int) -> Sample:
            start, part = parts[shard]
            return part.result()[index - start]

        return read
