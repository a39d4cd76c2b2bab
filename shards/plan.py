"""Which image goes into which shard: settled by hashes of the keys before anything is written, in bounded memory.

So a shard is an independent job: any number of workers and of machines write the same bytes, and a killed build goes
on where it was. Items are dealt to buckets by the first byte of their hash, buckets that fill memory are spilled to
disk, and each is sorted alone: 300 million images need the memory of a million.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from shards.errors import UserError
from shards.sources import Item

WHOLE = "all"  # the name of the only part of a build without a split
SPILL = 1_000_000  # items kept in memory, about 500 bytes each
_LISTED = 10  # pairs of one key in an error


@dataclass
class PartPlan:
    """What one data set is to hold.

    Attributes:
        samples: In each shard.
        changed: When the newest image of each shard was, nanoseconds since 1970; 0 if nobody knows.
        bytes: Of the images, as far as the source tells sizes before reading them.
        digest: Of keys, places in the source, sizes and labels of all images, in order.
    """

    samples: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Slice:
    """The shards that this process is to write: those whose number is ``index`` modulo ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Parse ``I/N``, counted from 0.

        Raises:
            UserError: It is not of that form.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--slice {text}: write I/N with I from 0 to N-1, such as 0/8 for the first of eight")
        return cls(int(index), int(count))

    def has(self, shard: int) -> bool:
        """Tell whether this process is to write that shard."""
        return shard % self.count == self.index


def make_plan(
    items: Iterable[Item],
    folder: Path,
    *,
    split: dict[str, float],
    seed: int,
    shard_samples: int,
    shard_bytes: int,
    own: Slice,
) -> dict[str, PartPlan]:
    """Deal items to parts and shards; write a job file for each own shard, to be read by ``read_job``.

    Args:
        items: What the source holds.
        folder: An empty folder for job files and what does not fit into memory.
        split: Share of each part beside ``train``. A hash of its key puts an image into its part, so that adding
            images moves none.
        seed: Of the global shuffle.
        shard_samples: At most so many samples a shard.
        shard_bytes: At most so many bytes of images a shard, but one image at least; unknown sizes count nothing.
        own: Shards to write job files for.

    Returns:
        The plan of each part by its name: ``all``, or ``train`` and the others.

    Raises:
        UserError: There is no image, a part is empty, a key is none that a tar can hold, two images have one key, the
            source has images in parts and others in none, or split and source name the same part.
    """
    parts: dict[str, _Sorter] = {}
    for item in items:
        _check_key(item)
        if item.part in split:
            raise UserError(f"--split {item.part}: the source has a part of that name itself; choose another")
        part = item.part or ("train" if split else WHOLE)
        if split and part == "train":
            part = _split(item.key, split)
        if part not in parts:
            parts[part] = _Sorter(folder / part)
        parts[part].add(hashlib.sha256(f"{seed}:{item.key}".encode()).digest(), item)
        if sum(sorter.held for sorter in parts.values()) >= SPILL:
            for sorter in parts.values():
                sorter.spill()
    if not parts:
        raise UserError("the source holds no images; check the path")
    if WHOLE in parts and len(parts) > 1:
        others = ", ".join(name for name in parts if name != WHOLE)
        raise UserError(f"the source has images in parts ({others}) and others in none; give one of them at a time")
    total = sum(sorter.count for sorter in parts.values())
    for name in ("train", *split) if split else ():
        if name not in parts:
            raise UserError(f"--split leaves no image for {name} out of {total}; choose other shares")
    return {name: _cut(parts[name], folder / name, shard_samples, shard_bytes, own) for name in _order(parts)}


def read_job(path: Path) -> list[Item]:
    """Return the images of one shard, in order."""
    return [Item(*fields) for fields in pickle.loads(path.read_bytes())]


def job_file(folder: Path, part: str, shard: int) -> Path:
    """Return the path of a job file that ``make_plan`` wrote into ``folder``."""
    return folder / part / f"{shard:06d}.job"


def _order(parts: Iterable[str]) -> list[str]:
    return sorted(parts, key=lambda name: (name != "train", name))


def _split(key: str, split: dict[str, float]) -> str:
    """Choose a part. Neither seed nor other images have a say in it."""
    place = int(hashlib.sha256(f"split:{key}".encode()).hexdigest()[:13], 16) / 16**13  # 52 bits: exact in a float
    for candidate, share in split.items():
        if place < share:
            return candidate
        place -= share
    return "train"


class _Sorter:
    """Items in the order of their hashes; ``count`` in all, ``held`` of them in memory, ``twins`` of the same key."""

    def __init__(self, folder: Path):
        self.count = self.held = self.twins = 0
        self.listed: list[str] = []  # some of the twins
        self._folder = folder
        self._buckets: list[list[tuple[bytes, tuple]]] = [[] for _ in range(256)]
        self._spilled = False

    def add(self, digest: bytes, item: Item) -> None:
        self._buckets[digest[0]].append((digest, tuple(item)))
        self.count += 1
        self.held += 1

    def spill(self) -> None:
        """Move what is in memory to disk."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, bucket in enumerate(self._buckets):
            with open(self._path(number), "ab") as file:
                pickle.dump(bucket, file, protocol=5)
            bucket.clear()
        self.held, self._spilled = 0, True

    def __iter__(self) -> Iterator[tuple]:
        for number, bucket in enumerate(self._buckets):
            if self._spilled:
                with open(self._path(number), "rb") as file:
                    while file.peek(1):
                        bucket += pickle.load(file)
                self._path(number).unlink()
            bucket.sort(key=lambda entry: (entry[0], entry[1][0]))
            for (_, one), (_, other) in pairwise(bucket):
                if one[0] == other[0]:
                    self.twins += 1
                    if self.twins <= _LISTED:
                        self.listed.append(f"{_place(one)} and {_place(other)} have one key, {one[0]}")
            yield from (item for _, item in bucket)
            bucket.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:02x}.bucket"


def _check_key(item: Item) -> None:
    try:
        item.key.encode()
        item.file.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {item.file!r} or its key {item.key!r} is not UTF-8; rename it") from error
    if not item.key or "\0" in item.key:
        raise UserError(
            f"{_place(item)} has the key {item.key!r}, which no tar can hold; rename it or give another key"
        )


def _place(item: tuple) -> str:
    file, offset = item[1], item[2]
    return f"{file} at byte {offset}" if offset else file


def _cut(items: _Sorter, folder: Path, shard_samples: int, shard_bytes: int, own: Slice) -> PartPlan:
    """Cut a part into shards and write the job files of the own ones."""
    plan, digest = PartPlan(), hashlib.sha256()
    folder.mkdir(parents=True, exist_ok=True)
    shard: list[tuple] = []
    size = 0

    def finish() -> None:
        plan.changed.append(max(item[6] for item in shard))
        if own.has(len(plan.samples)):
            job_file(folder.parent, folder.name, len(plan.samples)).write_bytes(pickle.dumps(shard, protocol=5))
        digest.update(json.dumps([item[:6] for item in shard]).encode())  # all but when files were changed
        plan.samples.append(len(shard))
        shard.clear()

    for item in items:
        known = max(item[3], 0)
        if shard and (len(shard) == shard_samples or size + known > shard_bytes):
            finish()
            size = 0
        shard.append(item)
        size += known
        plan.bytes += known
    finish()
    if items.twins:
        more = f", and {items.twins - _LISTED} more pairs" if items.twins > _LISTED else ""
        raise UserError(
            f"{'; '.join(items.listed)}{more} (the key is the path without extension, dots as _); rename or remove one "
            "of each"
        )
    plan.digest = digest.hexdigest()
    return plan
