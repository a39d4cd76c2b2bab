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


def evaluation_batches(
    dataset: Dataset,
    batch: int,
    *,
    transform: Transform,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
    prefetch: int = 2,
) -> Iterator[EvaluationBatch]:
    """Yield every sample exactly once over all ranks, in as many batches on each.

    Args:
        dataset: Single-label samples.
        batch: Samples a batch of each rank.
        transform: Makes squares of images.
        rank: Of this process.
        world_size: Number of ranks.
        threads: That decode.
        prefetch: Batches made ahead.

    Raises:
        DecodeError: A sample cannot be decoded; scores are never of fewer samples than they say.
    """
    ends = np.cumsum(dataset.shard_sizes)
    step = batch * world_size
    starts = iter(range(0, len(dataset), step))
    ahead: deque[Work] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            while len(ahead) <= prefetch and (start := next(starts, None)) is not None:
                positions = rank_positions(start, step, rank, world_size)
                real = positions[positions < len(dataset)]
                shard = np.searchsorted(ends, real, side="right")
                index = real - (ends - dataset.shard_sizes)[shard]
                epoch = np.zeros_like(positions)
                ahead.append(
                    Work(pool, Meter(), host_array, dataset.read, transform, 0, positions, epoch, shard, index)
                )
            if not ahead:
                return
            work = ahead.popleft()
            if broken := work.wait():
                raise broken[0].error
            valid = work.positions < len(dataset)
            yield EvaluationBatch(work.images, work.labels, work.positions, valid)
    finally:
        pool.shutdown(cancel_futures=True)
