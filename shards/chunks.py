"""Remote images, read chunk by chunk ahead of need: one range request for all the samples that lie together.

A chunk is read once for the lane that uses it, and kept until the last block that holds some of it is done; so memory
is this rank's share of the shuffle window, of chunks across the edges of blocks, and of what is read ahead. A cache on
this machine is asked first; chunks that it has take no memory beside the system's own. Local files need none of this.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from shards.cache import ChunkCache
from shards.dataset import Dataset, Sample, Through
from shards.mixedorder import MixedOrder
from shards.mixture import Mixture
from shards.order import Order
from shards.pace import Pace

REQUESTS = 16  # in flight: 8 MB each keep a 10 Gbit/s line busy at 100 ms
_EPOCHS = 4  # looked through for the next use of a chunk, at most


class ChunkReader:
    """Reads samples of a data set by chunks; ``ahead`` and ``release`` from one thread, ``read`` from any.

    Args:
        dataset: Some of whose shards are remote.
        order: That says which samples lie together, and how long each is needed.
        cache: On this machine.
        cache_ranks: Those that share the cache; None: all.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        dataset: Dataset | Mixture,
        order: Order | MixedOrder,
        cache: ChunkCache | None = None,
        cache_ranks: Sequence[int] | None = None,
        world_size: int = 1,
    ):
        self._dataset, self._order, self._cache, self._pace = dataset, order, cache, Pace()
        self._ranks, self._world_size = range(world_size) if cache_ranks is None else cache_ranks, world_size
        machines = -(-world_size // len(self._ranks))  # each chunk comes to this one every so many epochs
        self._epochs = max(1, min(machines, _EPOCHS))
        self._pool = ThreadPoolExecutor(dataset.concurrency or REQUESTS, thread_name_prefix="fetch")
        self._held: dict[tuple[int, int], Future[list[Sample]]] = {}
        self._until: dict[tuple[int, int], int] = {}  # the last position that needs the chunk

    def ahead(self, positions: np.ndarray) -> None:
        """Begin to read what the remote samples at these positions lie in; int64 [n], soon needed first."""
        _, shard, index = self._order.locate(positions)
        far = ~self._dataset.local[shard]
        positions, shard, index = positions[far], shard[far], index[far]
        number = index // self._order.chunk_sizes[shard]
        chunks = list(zip(shard.tolist(), number.tolist(), strict=True))
        new = {chunk: place for place, chunk in enumerate(chunks) if chunk not in self._held}
        for chunk, through in zip(new, self._through_cache(positions[list(new.values())]), strict=True):
            self._held[chunk] = self._pool.submit(self._fetch, *chunk, through)
        for chunk, last in zip(chunks, self._order.needed_until(positions).tolist(), strict=True):
            self._until[chunk] = max(last, self._until.get(chunk, last))

    def _through_cache(self, positions: np.ndarray) -> list[Through | None]:
        """Return how to read the chunks of samples: the cache must know when this machine needs each again."""
        if self._cache is None or not len(positions):
            return [None] * len(positions)
        uses = self._order.next_use(positions, self._ranks, self._world_size, self._epochs)
        return [partial(self._cache.read, next_use=self._pace.moment(use)) for use in uses.tolist()]

    def _fetch(self, shard: int, number: int, through: Through | None) -> list[Sample]:
        size = int(self._order.chunk_sizes[shard])
        return self._dataset.read_many(shard, number * size, (number + 1) * size, through)

    def read(self, shard: int, index: int) -> Sample:
        """Return a sample, waiting for its chunk; one that nobody announced is read alone.

        Raises:
            UserError, PatchmillError: As from ``Dataset.read_many``.
        """
        number, inside = divmod(index, int(self._order.chunk_sizes[shard]))
        chunk = self._held.get((shard, number))
        if not chunk:
            return self._dataset.read(shard, index)
        sample = chunk.result()[inside]
        return sample._replace(image=bytes(sample.image))  # no copy unless it is a view of the cache

    def release(self, position: int) -> None:
        """Let go of the chunks that no position from here on needs: the stream has come so far."""
        self._pace.at(position)
        self._let_go(position)

    def _let_go(self, position: int) -> None:
        for chunk in [chunk for chunk, until in self._until.items() if until < position]:
            self._held.pop(chunk).cancel()
            del self._until[chunk]

    def forget(self) -> None:
        """Let go of everything: the stream was set to another place."""
        self._pace.jump()
        self._let_go(max(self._until.values(), default=0) + 1)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
