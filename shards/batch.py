"""One batch: its samples are read and decoded by a pool of threads, straight into one array."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple

import numpy as np

from shards.augment import Key, Transform, transform_encoded
from shards.dataset import Sample
from shards.decode import DecodeError
from shards.errors import UserError
from shards.manylabels import NONE, Accepts, refusal, stacked
from shards.meter import Meter

_ROWS_A_TASK = 8  # few enough to share out a batch evenly, enough to make the pool's own cost small


def host_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array: what batches are made in unless the caller has better memory."""
    return np.empty(shape, dtype=np.uint8)


def side_of(transform: Transform) -> int:
    """Return the side of a transform's results, pixels; a UserError if it does not tell."""
    if not hasattr(transform, "size"):
        raise UserError(f"the transform {transform} has no attribute size; set it to the side of its results in pixels")
    return transform.size


def square(transform: Transform, data: bytes, name: str, key: Key) -> np.ndarray:
    """Decode and transform an image to uint8 [size, size, 3]; raises DecodeError, and UserError if it is not that."""
    image = transform_encoded(transform, data, name, key)
    shape = (transform.size, transform.size, 3)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != shape:
        made = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"the transform made {made} of {name}; let it make uint8 {shape}")
    return image


class Batch(NamedTuple):
    """A rank's share of a global batch of n samples a rank.

    Attributes:
        images: uint8 [n, size, size, 3], RGB.
        labels: int64 [n], class indices; of a loader that accepts more or fewer than one, [n, m] of fields ``label``,
            int64, and ``weight``, float32, with -1 and 0 past a sample's last.
        positions: int64 [n], global positions in the order.
    """

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


class Broken(NamedTuple):
    """A sample that did not decode, and the row of the batch it was for."""

    row: int
    sample: Sample
    error: DecodeError


class Work:
    """A batch in the making.

    Attributes:
        shards: int32 [n], where the sample in each row came from, as its reader tells: the number of its shard.
        indices: int32 [n], and its raw place there.
        replaced: By row, the broken sample that a stand-in replaces.

    Args:
        pool: Whose threads make it.
        meter: That counts what they do.
        allocate: Makes the array of the images from its shape, uint8, uninitialised.
        read: Returns the sample at (shard, index).
        transform: What makes squares of them.
        seed: First word of the keys of the transform.
        positions: int64 [n], the rest of the keys with ``epoch``.
        epoch: int64 [n].
        shard: int64 [rows], where the samples are; rows past these are zeros.
        index: int64 [rows].
        accepts: How many labels a sample may have.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        meter: Meter,
        allocate: Callable[[tuple[int, ...]], np.ndarray],
        read: Callable[[int, int], Sample],
        transform: Transform,
        seed: int,
        positions: np.ndarray,
        epoch: np.ndarray,
        shard: np.ndarray,
        index: np.ndarray,
        accepts: Accepts = "one",
    ):
        self.read, self.transform, self.positions, self._meter = read, transform, positions, meter
        size = side_of(transform)
        self.images = allocate((len(positions), size, size, 3))
        self.images[len(shard) :] = 0
        self._accepts, self._labels = accepts, [NONE] * len(positions)
        self.shards, self.indices = np.full((2, len(positions)), -1, dtype=np.int32)
        self.replaced: dict[int, Sample] = {}
        self.keys = [(seed, e, p) for e, p in zip(epoch.tolist(), positions.tolist(), strict=True)]
        self._where = list(zip(shard.tolist(), index.tolist(), strict=True))
        rows = range(len(self._where))
        self._tasks = [pool.submit(self._fill, rows[a : a + _ROWS_A_TASK]) for a in range(0, len(rows), _ROWS_A_TASK)]

    def _fill(self, rows: range) -> list[Broken]:
        broken, size, reading, decoding = [], 0, 0.0, 0.0
        for row in rows:
            shard, index = self._where[row]
            began = perf_counter()
            sample = self.read(shard, index)
            there = perf_counter()
            try:
                self.put(row, sample)
            except DecodeError as error:
                broken.append(Broken(row, sample, error))
            size, reading, decoding = (
                size + len(sample.image),
                reading + there - began,
                decoding + perf_counter() - there,
            )
        self._meter.add(size, reading, decoding)
        return broken

    def put(self, row: int, sample: Sample) -> None:
        """Decode a sample into a row; raises DecodeError, and UserError if the transform makes something else."""
        if wrong := refusal(len(sample.labels), self._accepts):
            raise UserError(f"sample {sample.key} has {wrong}; use a data set with a class for each image")
        self.images[row] = square(self.transform, sample.image, sample.key, self.keys[row])
        self._labels[row] = sample.labels, sample.weights
        self.shards[row], self.indices[row] = sample.shard, sample.index

    def missing(self) -> list[int]:
        """Return the shards of the samples that are not there yet; from any thread."""
        return sorted({shard for (shard, _), came in zip(self._where, self.shards.tolist(), strict=False) if came < 0})

    def wait(self) -> list[Broken]:
        """Wait for the batch; returns the samples that did not decode."""
        return [each for task in self._tasks for each in task.result()]

    @property
    def labels(self) -> np.ndarray:
        """Labels as ``Batch`` has them; 0 is the one label of rows that are not filled."""
        return stacked(self._labels, self._accepts)

    def cancel(self) -> None:
        """Leave undone what no thread has begun."""
        for task in self._tasks:
            task.cancel()
