"""Batches of tars that have no manifest: read through as they come, shuffled in a buffer, not to be resumed."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter
from typing import NamedTuple

import numpy as np

from shards.augment import Transform
from shards.batch import Batch, host_array, side_of, square
from shards.decode import DecodeError
from shards.errors import PatchmillError, UserError
from shards.hashing import hash_int
from shards.labels import ClassNames
from shards.manylabels import Accepts, Labels, stacked
from shards.meter import Counts, Meter
from shards.order import check_batch, rank_positions
from shards.storesettings import StoreSettings
from shards.tarstream import STDIN, Rejected, StreamedSample, Tar, find_streams, read_samples

_REJECTED_IN_A_ROW = 100  # end the stream: it holds something else than was thought
_TARS, _BUFFER = 7, 8  # first word of the hashes that shuffle; shards/hashing.py lists all


class _Decoded(NamedTuple):
    image: np.ndarray  # uint8 [size, size, 3]
    labels: Labels


class StreamLoader:
    """The stream of a rank's batches from tars without a manifest; for everything else there is ``Loader``.

    Tars and commands are read again and again, in another order each time; standard input ends, and what fills no batch
    is left out with a warning. Which samples come depends on the number of ranks: each reads tars of its own. Samples
    that cannot be used are left out, counted, noted in ``quarantine`` and told, at the first, tenth, hundredth and so
    on. A stream cannot go on where it stood: after ``load_state_dict`` it begins anew, and only counts on.

    Args:
        source: As for ``find_streams``: ``-``, ``pipe:COMMAND``, or tars.
        classes: Class names, which labels are looked up in.
        global_batch: Samples a step over all ranks.
        transform: Makes squares of images; the last number of its key counts the samples that were read.
        rank: Of this process.
        world_size: Number of ranks; it must divide ``global_batch``, and there must be a tar for each.
        seed: Of shuffling and augmentation.
        threads: That decode; reading is up to the thread that iterates.
        prefetch: Batches decoded ahead.
        buffer: Encoded images among which the shuffle mixes, within one reading of all tars.
        stop: The batch that reaches this many samples is the last; None: no batch is.
        allow_pipe: ``pipe:`` may run its command.
        store: Settings of the store of remote tars; by default those of the environment.
        quarantine: File that gets a JSON line for each sample that is left out.
        allocate: Makes the uint8 array of a batch from its shape, uninitialised; for pinned memory.
        labels: How many a sample may have, as for ``Loader``; one with others cannot be used.

    Attributes:
        samples: Global positions delivered.

    Raises:
        UserError: There are no tars or too few for the ranks, a command is not allowed, or the ranks do not divide
            the batch.
    """

    def __init__(
        self,
        source: str,
        classes: list[str],
        *,
        global_batch: int,
        transform: Transform,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        buffer: int = 1000,
        stop: int | None = None,
        allow_pipe: bool = False,
        store: StoreSettings | None = None,
        quarantine: str | os.PathLike | None = None,
        allocate: Callable[[tuple[int, ...]], np.ndarray] = host_array,
        labels: Accepts = "one",
    ):
        check_batch(global_batch, world_size)
        self._tars = find_streams(source, allow_pipe, store)
        if len(self._tars) < world_size:
            raise UserError(
                f"{source} is {len(self._tars)} tar(s) for {world_size} ranks, and each reads tars of its own; name "
                "more, or index them with `patchmill shards index`"
            )
        self.source, self.global_batch, self.transform, self.stop = source, global_batch, transform, stop
        self.samples = 0
        self._rank, self._world_size, self._seed, self._threads = rank, world_size, seed, threads
        self._prefetch, self._buffer, self._allocate = prefetch, buffer, allocate
        self._quarantine = Path(quarantine) if quarantine else None
        self._size, self._classes, self._accepts = side_of(transform), ClassNames(classes), labels
        self._meter, self._rejected, self._reading = Meter(), 0, ""
        if rank == 0:
            _warn(f"{source} has no manifest: a run on it cannot be resumed where it stopped, nor be the same again on "
                  "other ranks; `patchmill shards index` makes a manifest for tars")  # fmt: skip

    def __iter__(self) -> Generator[Batch]:
        """Yield batches.

        Raises:
            UserError, PatchmillError: A tar cannot be read to its end, or a hundred samples one after another cannot
                be used.
        """
        rows = self.global_batch // self._world_size
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        coming: deque[Future[_Decoded | Rejected]] = deque()
        found: list[_Decoded] = []
        broken, numbers = 0, count(self.samples // self._world_size)
        try:
            with closing(self._read()) as samples:
                while self.stop is None or self.samples < self.stop:
                    while len(found) < rows:
                        wanted = (1 + self._prefetch) * rows - len(found)
                        while len(coming) < wanted and (sample := self._next(samples)):
                            coming.append(pool.submit(self._decode, sample, next(numbers)))
                        if not coming:
                            if found:
                                _warn(f"the last {len(found)} samples of {self.source} fill no batch and are left out")
                            return
                        done = coming.popleft().result()
                        if isinstance(done, Rejected):
                            broken += 1
                            self._reject(done, broken)
                        else:
                            broken = 0
                            found.append(done)
                    yield self._batch(found)
                    found.clear()
        finally:
            pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """Return how many batches iterating gives from here on.

        Raises:
            TypeError: No ``stop`` is set, or standard input may end before it.
        """
        if self.stop is None or self.source == STDIN:
            raise TypeError(f"nobody knows where {self.source} ends, so it has no length; give tars and stop=...")
        return max(0, -((self.samples - self.stop) // self.global_batch))

    def _batch(self, found: list[_Decoded]) -> Batch:
        images = self._allocate((len(found), self._size, self._size, 3))
        np.stack([each.image for each in found], out=images)
        labels = stacked([each.labels for each in found], self._accepts)
        positions = rank_positions(self.samples, self.global_batch, self._rank, self._world_size)
        self.samples += self.global_batch
        return Batch(images, labels, positions)

    def _next(self, samples: Iterator[StreamedSample]) -> StreamedSample | None:
        began = perf_counter()
        sample = next(samples, None)
        self._meter.add(len(sample.image) if sample else 0, perf_counter() - began, 0.0)
        return sample

    def _read(self) -> Generator[StreamedSample]:
        from webdataset.filters import shuffle  # imports torch

        for turn in count():
            order = sorted(range(len(self._tars)), key=lambda tar: hash_int(_TARS, self._seed, turn, tar))
            tars = [self._tars[number] for number in order[self._rank :: self._world_size]]
            rng = Random(hash_int(_BUFFER, self._seed, turn, self._rank))
            yield from shuffle(self._buffer, rng=rng)(self._usable(tars))
            if self.source == STDIN:
                return

    def _usable(self, tars: list[Tar]) -> Iterator[StreamedSample]:
        usable = unusable = 0
        for tar in tars:
            self._reading = tar.name
            for sample in read_samples(tar, self._classes, self._accepts):
                if isinstance(sample, Rejected):
                    unusable += 1
                    self._reject(sample, unusable)
                else:
                    usable, unusable = usable + 1, 0
                    yield sample
        if not usable:
            raise UserError(f"{self.source} holds no sample with an image and a label; see docs/indexing.md for both")

    def _decode(self, sample: StreamedSample, number: int) -> _Decoded | Rejected:
        began = perf_counter()
        key = (self._seed, 0, number * self._world_size + self._rank)
        try:
            return _Decoded(square(self.transform, sample.image, sample.key, key), sample.labels)
        except DecodeError as error:
            return Rejected(sample.key, sample.tar, str(error))
        finally:
            self._meter.add(0, 0.0, perf_counter() - began)

    def _reject(self, sample: Rejected, in_a_row: int) -> None:
        self._rejected += 1
        if self._quarantine is not None:
            self._note(self._quarantine, sample)
        told = f"the last is {sample.key} of {sample.tar}: {sample.reason}"
        if in_a_row >= _REJECTED_IN_A_ROW:
            raise PatchmillError(f"{in_a_row} samples one after another cannot be used; {told}; check {self.source}")
        if str(self._rejected).rstrip("0") == "1":
            _warn(f"{self._rejected} samples left out so far; {told}")

    @staticmethod
    def _note(path: Path, sample: Rejected) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(sample._asdict()) + "\n")
        except OSError as error:
            raise PatchmillError(
                f"cannot write {path}: {error.strerror}; make room or mend the disk, then run again"
            ) from error

    def counts(self) -> Counts:
        """Return what was counted since the loader was made; samples left out count as quarantined."""
        return self._meter.counts(quarantined=self._rejected, replaced=0)

    def awaited(self) -> list[str]:
        """Return the tar that is being read; from any thread."""
        return [self._reading]

    def state_dict(self) -> dict:
        """Return how many samples were delivered; more cannot be known."""
        return {"samples": self.samples, "stream": self.source}

    def load_state_dict(self, state: dict, allow_decoder_change: bool = False) -> None:
        """Count on from a stream's samples, with a warning: it begins anew.

        Raises:
            UserError: The state is of a data set that has a manifest.
        """
        if "stream" not in state:
            raise UserError(
                f"cannot go on with the stream {self.source}: the checkpoint is of a data set with a manifest; give it "
                "that data set, or start a new run from the checkpoint's weights"
            )
        self.samples = state["samples"]
        if self._rank == 0:
            _warn(f"{self.source} begins anew after {self.samples} samples: some come again, some not at all")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
