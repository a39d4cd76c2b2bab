"""Remote images, read chunk by chunk ahead of need: one range request for all the samples that lie together.

A chunk is read once for the lane that uses it, and kept until the last block that holds some of it is done; so memory
is this rank's share of the shuffle window. Local files need none of this.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from shards.dataset import Dataset, Sample
from shards.mixedorder import MixedOrder
from shards.mixture import Mixture
from shards.order import Order

REQUESTS = 16  # in flight: 8 MB each keep a 10 Gbit/s line busy at 100 ms


class ChunkReader:
    """Reads samples of a data set by chunks; ``ahead`` and ``release`` from one thread, ``read`` from any.

    Args:
        dataset: Some of whose shards are remote.
        order: That says which samples lie together, and how long each is needed.
        requests: In flight at most.

    Attributes:
        chunks: Read so far.
        bytes: Of the images in them.
    """

    def __init__(self, dataset: Dataset | Mixture, order: Order | MixedOrder, requests: int = REQUESTS):
        self.chunks = self.bytes = 0
        self._dataset, self._order = dataset, order
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="fetch")
        self._held: dict[tuple[int, int], Future[list[Sample]]] = {}
        self._until: dict[tuple[int, int], int] = {}  # the last position that needs the chunk

    def ahead(self, positions: np.ndarray) -> None:
        """Begin to read what the remote samples at these positions lie in; int64 [n], soon needed first."""
        _, shard, index = self._order.locate(positions)
        far = ~self._dataset.local[shard]
        shard, index, until = shard[far], index[far], self._order.needed_until(positions[far])
        number = index // self._order.chunk_sizes[shard]
        for place in zip(shard.tolist(), number.tolist(), until.tolist(), strict=True):
            self._hold(place[:2], place[2])

    def _hold(self, chunk: tuple[int, int], until: int) -> None:
        if chunk not in self._held:
            self._held[chunk] = self._pool.submit(self._fetch, *chunk)
        self._until[chunk] = max(until, self._until.get(chunk, until))

    def _fetch(self, shard: int, number: int) -> list[Sample]:
        size = int(self._order.chunk_sizes[shard])
        samples = self._dataset.read_many(shard, number * size, (number + 1) * size)
        self.chunks += 1
        self.bytes += sum(len(sample.image) for sample in samples)
        return samples

    def read(self, shard: int, index: int) -> Sample:
        """Return a sample, waiting for its chunk; one that nobody announced is read alone.

        Raises:
            UserError, PatchmillError: As from ``Dataset.read_many``.
        """
        number, inside = divmod(index, int(self._order.chunk_sizes[shard]))
        chunk = self._held.get((shard, number))
        return chunk.result()[inside] if chunk else self._dataset.read(shard, index)

    def release(self, position: int) -> None:
        """Let go of the chunks that no position from here on needs."""
        for chunk in [chunk for chunk, until in self._until.items() if until < position]:
            self._held.pop(chunk).cancel()
            del self._until[chunk]

    def forget(self) -> None:
        """Let go of everything: the stream was set to another place."""
        self.release(max(self._until.values(), default=0) + 1)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
