"""Values that occur more than once in a column of a data set, in 8 bytes of memory a sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from shards.dataset import Dataset
from shards.progress import ImageProgress

EXAMPLES = 10  # values
PLACES = 5  # of each
_NAMES = {"key": "keys", "xxh128": "images"}
CHUNK = 1 << 24  # hashes looked at in one go


class Place(NamedTuple):
    """A sample: its shard and key."""

    shard: int
    key: str


@dataclass(frozen=True)
class Repeats:
    """What occurs more than once.

    Counted by 64-bit hashes: among 300 million values, two different ones share a hash with a chance of 1 in 400.

    Attributes:
        values: How many values occur more than once.
        extra: How many samples there are beyond the first of each such value.
        examples: The first of these values: the samples that share it, five at most; compared in full.
    """

    values: int
    extra: int
    examples: list[list[Place]]


def repeats(dataset: Dataset, column: str, progress: bool = False) -> Repeats:
    """Find what occurs more than once in a column of the sample tables, ``key`` or ``xxh128``; reads it all once.

    Only where something does occur twice, the tables are read again, until the examples are found.
    """
    with ImageProgress(f"repeated {_NAMES[column]}", len(dataset), show=progress) as bar:
        hashes = np.empty(len(dataset), np.int64)
        filled = 0
        for shard, size in enumerate(dataset.shard_sizes.tolist()):
            hashes[filled : filled + size] = _hashes(dataset.table(shard, [column])[column])
            filled += size
            bar.advance(size, 0)
    hashes.sort()
    values = extra = 0
    for start in range(0, len(hashes) - 1, CHUNK):
        part = hashes[start : start + CHUNK + 1]
        same = part[1:] == part[:-1]
        before = bool(start) and hashes[start - 1] == hashes[start]
        extra += int(np.count_nonzero(same))
        values += int(np.count_nonzero(same & ~np.concatenate([[before], same[:-1]])))
    return Repeats(values, extra, _examples(dataset, column, hashes) if extra else [])


def _hashes(values: pa.ChunkedArray) -> np.ndarray:
    """Return (n,) int64; good for this process only, as Python's hashes of strings are."""
    return np.fromiter(map(hash, values.to_pylist()), np.int64, len(values))


def _examples(dataset: Dataset, column: str, hashes: np.ndarray) -> list[list[Place]]:
    """Go through the samples again until the first repeated values are known with all their places."""
    found: dict[object, list[Place]] = {}
    awaited: dict[object, int] = {}
    for value, copies, place in _repeated(dataset, column, hashes):
        if value not in found:
            if len(found) == EXAMPLES:
                continue
            found[value], awaited[value] = [], min(copies, PLACES)
        if len(found[value]) < PLACES:
            found[value].append(place)
            awaited[value] -= 1
        if len(found) == EXAMPLES and not any(awaited.values()):
            break
    return [places for places in found.values() if len(places) > 1]


def _repeated(dataset: Dataset, column: str, hashes: np.ndarray) -> Iterator[tuple[object, int, Place]]:
    """Yield value, number of copies and place of each sample whose value is there more than once."""
    for shard in range(len(dataset.shard_sizes)):
        table = dataset.table(shard, list({"key", column}))
        mine = _hashes(table[column])
        copies = np.searchsorted(hashes, mine, side="right") - np.searchsorted(hashes, mine)
        again = np.flatnonzero(copies > 1)
        some = table.take(again)
        for value, count, key in zip(some[column].to_pylist(), copies[again], some["key"].to_pylist(), strict=True):
            yield value, int(count), Place(shard, key)
