"""Batches of a data set in the order of shards/order.py, from any position on, without end if none is set."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shards.augment import RESIZER, Transform
from shards.batch import Batch, Broken, Work, host_array
from shards.cache import ChunkCache
from shards.chunks import ChunkReader
from shards.dataset import Dataset, Sample
from shards.decode import DECODER, DecodeError
from shards.errors import PatchmillError
from shards.identity import check_identity
from shards.ledger import Ledger
from shards.manylabels import Accepts
from shards.meter import Counts, Meter
from shards.mixture import Mixture
from shards.names import tar_name
from shards.order import DEFAULT_WINDOW_BYTES, STAND_INS, check_batch, rank_positions
from shards.quarantine import Quarantine

READ_AHEAD = 8  # batches whose remote chunks are on the way before they are decoded


class Loader:
    """The stream of a rank's batches, endless unless ``stop`` says where it ends. Nothing needs to wrap it.

    Where the stream stands is ``samples``, the global positions delivered so far; another number of ranks or
    threads gives the same global batches from there. ``global_batch`` may be set between two batches. Iterating goes on
    where the stream stands; its threads end when the iterator is closed or let go.

    Args:
        dataset: Samples of one data set or of a mixture.
        global_batch: Samples a step over all ranks.
        transform: Makes squares of images; one of yours will do, see ``Transform`` in shards/augment.py.
        rank: Of this process.
        world_size: Number of ranks; it must divide ``global_batch``.
        seed: Of order and augmentation.
        threads: That decode.
        prefetch: Batches made ahead.
        window_bytes: Size of the shuffle window over the whole cluster.
        lanes: Of the order, instead of the choice made from data and window.
        chunk: Of the order, in samples, likewise.
        block: Of the order, in samples, likewise.
        stop: The batch that reaches this many samples is the last; it may be set at any time. None: no batch is.
        quarantine: File that gets a JSON line for each sample that could not be decoded; ranks and restarts share it.
        ledger: Folder that gets a record of every sample delivered, for ``shards/audit.py``: from
            ``shards.ledger.new_segment``, a new one each start, the same on all ranks.
        allocate: Makes the uint8 array of a batch from its shape, uninitialised; for pinned memory.
        cache: For the chunks of remote data, on this machine.
        cache_ranks: Those of the ranks that share the cache: the ones of this machine; None: all.
        labels: How many a sample may have: "one", exactly; "some", one at least; or "any" number. ``Batch`` says how
            each comes.

    Attributes:
        order: The order it follows.
        samples: Global positions delivered.
        replaced: Samples of this rank that a stand-in replaced.
        cache: As given; it counts hits, misses and bytes.

    Raises:
        UserError: The ranks do not divide the batch, or there is no sample.
    """

    def __init__(
        self,
        dataset: Dataset | Mixture,
        *,
        global_batch: int,
        transform: Transform,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        window_bytes: float = DEFAULT_WINDOW_BYTES,
        lanes: int | None = None,
        chunk: int | None = None,
        block: int | None = None,
        stop: int | None = None,
        quarantine: str | os.PathLike | None = None,
        ledger: str | os.PathLike | None = None,
        allocate: Callable[[tuple[int, ...]], np.ndarray] = host_array,
        cache: ChunkCache | None = None,
        cache_ranks: Sequence[int] | None = None,
        labels: Accepts = "one",
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.rank, self.world_size, self.threads, self.prefetch = rank, world_size, threads, prefetch
        self.global_batch = global_batch
        self.order = dataset.order(seed, window_bytes, lanes, chunk, block)
        self.samples = 0
        self.stop = stop
        self.replaced = 0
        self.cache, self._cache_ranks, self._accepts = cache, cache_ranks, labels
        self._quarantine = Quarantine(quarantine, dataset)
        self._ledger = Ledger(ledger, dataset, self.order, rank, world_size) if ledger else None
        self._meter, self._allocate = Meter(), allocate
        self._awaited: Work | None = None
        self._handing_out = threading.Lock()  # a thread that fetches ahead may iterate while another asks for the state

    def counts(self) -> Counts:
        """Return what was counted since the loader was made; what was decoded ahead counts already."""
        cache = {"cache_hits": self.cache.hits, "cache_misses": self.cache.misses} if self.cache else {}
        return self._meter.counts(
            replaced=self.replaced, quarantined=len(self._quarantine.met), retries=self.dataset.retries, **cache
        )

    def awaited(self) -> list[str]:
        """Return the tars of the samples that the next batch waits for, if somebody waits for it; from any thread."""
        work = self._awaited
        return [tar_name(self.dataset, shard) for shard in work.missing()] if work else []

    @property
    def global_batch(self) -> int:
        """Samples a step over all ranks; to be set between two batches."""
        return self._global_batch

    @global_batch.setter
    def global_batch(self, samples: int) -> None:
        check_batch(samples, self.world_size)
        self._global_batch = samples

    def __iter__(self) -> Generator[Batch]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        chunks = None
        if not self.dataset.local.all():
            chunks = ChunkReader(self.dataset, self.order, self.cache, self._cache_ranks, self.world_size)
        read = chunks.read if chunks else self.dataset.read
        ahead: deque[Work] = deque()
        announced, first, stood = self.samples, True, (self.samples, self.global_batch)
        try:
            while left := self._batches_left():
                if stood != (self.samples, self.global_batch):  # it was set: what was made ahead is of no use
                    while ahead:
                        ahead.pop().cancel()
                    if chunks:
                        chunks.forget()
                    announced, first = self.samples, True
                batches, further = self.prefetch + 1, READ_AHEAD
                if chunks:
                    chunks.release(self.samples)
                    if first:  # until it is there, the first batch has network and cores alone
                        batches, further, first = 1, 0, False
                    upto = self.samples + min(left, batches + further) * self.global_batch
                    chunks.ahead(rank_positions(announced, upto - announced, self.rank, self.world_size))
                    announced = max(announced, upto)
                while len(ahead) < min(left, batches):
                    ahead.append(self._begin(pool, read, self.samples + len(ahead) * self.global_batch))
                self._awaited = work = ahead.popleft()
                for broken in work.wait():
                    self._replace(work, broken)
                self._awaited = None
                with self._handing_out:
                    if self._ledger:
                        self._ledger.append(self.samples, work)
                    self.samples += self.global_batch
                stood = (self.samples, self.global_batch)
                yield Batch(work.images, work.labels, work.positions)
        finally:
            if chunks:
                chunks.close()
            pool.shutdown(cancel_futures=True)
            if self._ledger:
                self._ledger.flush()

    def __len__(self) -> int:
        """Return how many batches iterating gives from here on.

        Raises:
            TypeError: No ``stop`` is set: the stream has no end.
        """
        if self.stop is None:
            raise TypeError("the stream of batches has no end, so no length; set Loader(stop=...) for one")
        return self._batches_left()

    def _batches_left(self) -> int:
        return sys.maxsize if self.stop is None else max(0, -((self.samples - self.stop) // self.global_batch))

    def _begin(self, pool: ThreadPoolExecutor, read: Callable[[int, int], Sample], position: int) -> Work:
        positions = rank_positions(position, self.global_batch, self.rank, self.world_size)
        return Work(
            pool, self._meter, self._allocate, read, self.transform, self.seed, positions,
            *self.order.locate(positions), self._accepts,
        )  # fmt: skip

    def _replace(self, work: Work, broken: Broken) -> None:
        """Put the first stand-in that decodes into the row of a broken sample, under the row's own key."""
        self.replaced += 1
        position, sample, error = int(work.positions[broken.row]), broken.sample, broken.error
        for attempt in range(1, STAND_INS + 1):
            self._quarantine.add(sample, position, str(error))
            position = self.order.stand_in(int(work.positions[broken.row]), attempt)
            _, shard, index = (int(x[0]) for x in self.order.locate(np.array([position])))
            sample = work.read(shard, index)
            try:
                work.put(broken.row, sample)
            except DecodeError as problem:
                error = problem
                continue
            work.replaced[broken.row] = broken.sample
            return
        dataset, shard = self.dataset.place(broken.sample.shard)
        raise PatchmillError(
            f"{broken.sample.key} in shard {shard} of {dataset.url} and {STAND_INS} samples near it cannot be decoded; "
            "check the data set"
        ) from broken.error

    def state_dict(self) -> dict:
        """Return where the stream stands (``samples``), and what a resumed run must agree on; from any thread.

        With a ledger or a quarantine, what they hold up to here is durable from now on: call it on every rank.
        """
        with self._handing_out:
            self._quarantine.commit()
            if self._ledger:
                self._ledger.commit()
            ledger = {"ledger": self._ledger.segment} if self._ledger else {}
            return {"samples": self.samples, **ledger, **self._identity()}

    def load_state_dict(self, state: dict, allow_decoder_change: bool = False) -> None:
        """Go on where a stream stood, on any number of ranks.

        Raises:
            UserError: It was a stream of another order, seed, data set or drop list, of other weights, or decoded by
                another version; the last can be allowed.
        """
        mine = self._identity()
        if allow_decoder_change:
            del mine["decoder"]
        check_identity(mine, state)
        self.samples = state["samples"]
        if self._ledger:
            self._ledger.go_on_from(state.get("ledger"))

    def _identity(self) -> dict:
        order = self.order.identity(self.dataset.digest)
        return {**order, "exclude": self.dataset.exclude, "decoder": f"{DECODER}, {RESIZER}"}
