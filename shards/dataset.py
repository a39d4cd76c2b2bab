"""A data set at rest: opening costs O(shards), sample rows are read lazily, shard by shard."""

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128_digest

from shards import manifest
from shards.errors import PatchmillError, UserError
from shards.hashing import hash_array, hash_int
from shards.objects import MissingError
from shards.order import DEFAULT_WINDOW_BYTES, Order, choose_shuffle
from shards.store import Store, open_store
from shards.storesettings import StoreSettings
from shards.tuples import Tuples

_SUBSET = 12  # what a hash is for; shards/hashing.py lists all
ROW_COLUMNS = ["key", "offset", "size", "format", "labels", "weights", "width", "height", "member", "xxh128"]
BLOCK = 512  # bytes of a tar header, which precedes each image
CACHED_ROWS = 4_000_000  # kept in memory per open data set: about 70 to 120 bytes each
TRIES = 10  # of bytes that a server sends otherwise each time

Through = Callable[[str, list[int], Callable[[], list[bytes]]], list[bytes] | list[memoryview]]
"""Gives the bytes of several samples, by a name for them (40 hex digits), their lengths, and what fetches them."""


class Sample(NamedTuple):
    """One encoded image and where it lies.

    Attributes:
        key: Its name in the shard.
        image: The bytes of the file.
        format: jpg, png or webp.
        labels: Class indices.
        weights: Of the labels; none: all are 1.
        shard: Number of the shard, in a mixture over all sources; -1 if it is of none.
        index: Raw place in the shard: dropped samples count.
        offset: First byte in the tar.
    """

    key: str
    image: bytes
    format: str
    labels: tuple[int, ...]
    weights: tuple[float, ...] = ()
    shard: int = -1
    index: int = -1  # type: ignore[assignment]  # of a tuple it is a method
    offset: int = -1


@dataclass(frozen=True)
class Rows:
    """The kept samples of one shard, in tar order; ``n`` below is their number.

    Attributes:
        index: (n,) int32, raw place in the shard: dropped samples count.
        offset: (n,) int64, first byte of the image in the tar.
        size: (n,) int64, bytes of the image.
        width: (n,) int32, pixels, as in the image's header (EXIF orientation not applied).
        height: (n,) int32, pixels.
        format: n strings: jpg, png or webp.
        labels: n tuples of class indices.
        weights: n tuples of their weights, empty where all are 1; None if they are so everywhere.
        member: (n,) uint32, CRC-32 of the tar header before each image.
        xxh128: n times 16 bytes, XXH3-128 of each image.
        keys: n strings in compact form; ``key`` is the same as a list.
    """

    index: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    format: list[str]
    labels: Sequence[tuple[int, ...]]
    weights: Sequence[tuple[float, ...]] | None
    member: np.ndarray
    xxh128: pa.ChunkedArray
    keys: pa.ChunkedArray

    @cached_property
    def key(self) -> list[str]:
        """The n keys of the samples."""
        return self.keys.to_pylist()

    def __len__(self) -> int:
        return len(self.offset)

    def is_whole(self, index: int, data: bytes) -> bool:
        """Tell whether bytes of the tar are the tar header of a sample and its image, as they were when made."""
        return self.begins(index, data) and xxh3_128_digest(memoryview(data)[BLOCK:]) == self.xxh128[index].as_py()

    def begins(self, index: int, data: bytes) -> bool:
        """Tell whether bytes of the tar begin with the tar header of a sample."""
        return zlib.crc32(data[:BLOCK]) == self.member[index]


class Dataset:
    """A data set, less the samples of one drop list. Made by ``Dataset.open``; safe to share between threads.

    Attributes:
        url: Where it is.
        exclude: The version of the drop list in use, or None.
        subset: How many samples were asked for, of whole shards that are the same ones always; None: all.
        classes: Class names; labels index into them.
        build: The settings that made it: its ``source``, whether images may have several labels, and so on.
        digest: Hex digest of classes, shard contents, dropped samples, and the shards of a subset.
        paths: Of the tars, one a shard.
        raw_sizes: (shards,) int64, samples a shard, dropped ones too.
        shard_sizes: (shards,) int64, kept samples a shard; 0 of those that are not in the subset.
        mean_bytes: Mean size of an image in bytes, before dropping.
        store: Where its manifest is read.
        tars: Where its images are read.
        local: (shards,) bool, whether reads of a shard are cheap one by one.
        concurrency: Requests in flight, as the settings of its stores say; None leaves it to the reader.
    """

    def __init__(
        self,
        store: Store,
        info: manifest.Info,
        shards: pa.Table,
        exclude: str | None,
        dropped: np.ndarray,
        cached_shards: int | None,
        settings: StoreSettings,
        subset: int | None,
    ):
        self.store, self.url, self.exclude, self.subset = store, store.url, exclude, subset
        self._opened = store.url, exclude, cached_shards, settings, subset
        self.concurrency = settings.concurrency
        try:
            self.tars = open_store(info.tars, settings=settings) if info.tars else store
        except MissingError as error:
            raise UserError(f"the tars of {store.url} are not at {info.tars}; index them where they are") from error
        self._read_again, self._lock = 0, threading.Lock()
        self._remedy = "index them" if info.build.get("source") == "index" else "copy or build the data set"
        self.classes, self.build = info.classes, info.build
        self.mean_bytes = info.image_bytes / info.samples
        self.paths = shards["path"].to_pylist()
        self.raw_sizes = shards["samples"].to_numpy()
        self._sha256 = shards["sha256"]
        _check_counts(self.raw_sizes, shards["bytes"].to_numpy(), dropped, self.url, exclude)
        self._shard_bytes = shards["bytes"].to_numpy()
        self._dropped = dropped[1]
        self._dropped_starts = np.searchsorted(dropped[0], np.arange(len(shards) + 1))
        self.shard_sizes = self.raw_sizes - np.diff(self._dropped_starts)
        self.local = np.full(len(shards), self.tars.local)
        self.digest = info.digest if exclude is None else manifest.digest_with_exclude(info.digest, *dropped)
        if subset is not None:
            inside = _subset(self.shard_sizes, subset, self.url)
            self.shard_sizes = np.where(inside, self.shard_sizes, 0)
            if not inside.all():
                self.digest = hashlib.sha256(self.digest.encode() + np.packbits(inside).tobytes()).hexdigest()
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        cached_shards = cached_shards or max(64, CACHED_ROWS // max(1, info.samples // max(1, len(shards))))
        self._cached_rows = lru_cache(maxsize=cached_shards)(self._read_rows)

    @classmethod
    def open(
        cls,
        url: str | Path,
        exclude: str | None = None,
        cached_shards: int | None = None,
        settings: StoreSettings | None = None,
        subset: int | None = None,
    ) -> "Dataset":
        """Open the data set at ``url``, leaving out the samples of drop list ``exclude``.

        Reads ``dataset.json``, ``shards.parquet`` and the drop list, nothing of the samples.

        Args:
            url: Local path or URL.
            exclude: Version of the drop list, or None.
            cached_shards: So many shards' rows stay in memory; by default those of 4 million samples.
            settings: Of its remote stores; by default those of the environment.
            subset: Take so many samples alone, or the few more that whole shards have. A hash draws the shards, always
                the same: a smaller subset is part of each larger one.

        Raises:
            UserError: There is no whole data set at ``url``, it has no images or fewer than that, or no such drop list.
        """
        settings = settings or StoreSettings()
        store = open_store(url, settings=settings)
        try:
            info = manifest.read_info(store)
        except MissingError as error:
            raise UserError(f"no data set at {store.url}{_hint(store)}") from error
        if not info.samples:
            raise UserError(f"{store.url} has no images; build it of some, or index tars that have some")
        shards = manifest.open_table(store, manifest.SHARDS, manifest.SHARDS_SCHEMA.names)
        if manifest.digest(info.classes, shards["sha256"].to_pylist(), info.build) != info.digest:
            raise UserError(f"{store.url}: dataset.json and shards.parquet do not belong together; build it again")
        return cls(store, info, shards, exclude, _read_dropped(store, exclude), cached_shards, settings, subset)

    def __reduce__(self) -> tuple:
        """Let another process open it again: connections and descriptors do not travel."""
        return Dataset.open, self._opened

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(
        self,
        seed: int,
        window_bytes: float = DEFAULT_WINDOW_BYTES,
        lanes: int | None = None,
        chunk: int | None = None,
        block: int | None = None,
    ) -> Order:
        """Return the order of a run; see ``choose_shuffle`` in shards/order.py for the arguments.

        Raises:
            UserError: There is no sample left.
        """
        shuffle = choose_shuffle(len(self), self.mean_bytes, window_bytes, lanes, chunk, block)
        return Order(self.shard_sizes, seed, shuffle)

    @property
    def datasets(self) -> list["Dataset"]:
        """The data sets of which the shards are; as of a ``Mixture``, which has several."""
        return [self]

    @property
    def retries(self) -> int:
        """Reads from its stores that were asked again so far."""
        return self._read_again + sum(store.retries for store in {self.store, self.tars})

    def place(self, shard: int) -> tuple["Dataset", int]:
        """Return the data set that a shard is of, and its number there; as of a ``Mixture``, which has several."""
        return self, shard

    def rows(self, shard: int) -> Rows:
        """Return the kept samples of a shard; those of the shards used last stay in memory."""
        return self._cached_rows(shard)

    def table(self, shard: int, columns: list[str]) -> pa.Table:
        """Read columns of ``manifest.SAMPLES_SCHEMA``, for the kept samples of a shard; nothing stays in memory."""
        path = manifest.samples_path(shard)
        table = manifest.open_table(self.store, path, columns)
        if len(table) != self.raw_sizes[shard]:
            raise UserError(
                f"{self.url}/{path} has {len(table)} rows, shards.parquet says {self.raw_sizes[shard]}; "
                "copy or build the data set again"
            )
        return table if len(table) == self.shard_sizes[shard] else table.take(self.raw_indices(shard))

    def raw_indices(self, shard: int) -> np.ndarray:
        """Return the place of each kept sample of a shard among all its samples, int32 [kept]."""
        return np.delete(np.arange(self.raw_sizes[shard], dtype=np.int32), self.dropped(shard))

    def dropped(self, shard: int) -> np.ndarray:
        """Return the raw indices of a shard's dropped samples, ascending, int32; all of a shard outside the subset."""
        if not self.shard_sizes[shard]:
            return np.arange(self.raw_sizes[shard], dtype=np.int32)
        return self._dropped[self._dropped_starts[shard] : self._dropped_starts[shard + 1]]

    def _read_rows(self, shard: int) -> Rows:
        table = self.table(shard, ROW_COLUMNS)
        self._check_places(shard, table["offset"].to_numpy(), table["size"].to_numpy())
        formats = table["format"].combine_chunks().dictionary_encode()
        return Rows(
            index=self.raw_indices(shard),
            offset=table["offset"].to_numpy(),
            size=table["size"].to_numpy(),
            width=table["width"].to_numpy(),
            height=table["height"].to_numpy(),
            format=np.array(formats.dictionary.to_pylist(), dtype=object)[formats.indices.to_numpy()].tolist(),
            labels=Tuples(table["labels"]),
            weights=None if table["weights"].null_count == len(table) else Tuples(table["weights"]),
            member=table["member"].to_numpy(),
            xxh128=table["xxh128"],
            keys=table["key"],
        )

    def _check_places(self, shard: int, offset: np.ndarray, size: np.ndarray) -> None:
        """Raise a UserError unless all images lie in the tar: as much memory is asked for as they are said to have."""
        if not ((offset >= BLOCK) & (size >= 0) & (size <= self._shard_bytes[shard] - offset)).all():
            raise UserError(
                f"{self.url}/{manifest.samples_path(shard)} is damaged (it names bytes outside the tar, which has "
                f"{self._shard_bytes[shard]}); {manifest.REMEDY}"
            )

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample by its place among the kept samples of a shard.

        Raises:
            UserError: The tar is not the one that was built or indexed, or the sample's label is of no class.
            PatchmillError: It cannot be read.
        """
        rows = self.rows(shard)
        (data,) = self._read(rows, shard, [index])
        return self._sample(rows, shard, index, data)

    def read_many(self, shard: int, start: int, stop: int, through: Through | None = None) -> list[Sample]:
        """Read consecutive kept samples of a shard; on a remote store with as few requests as possible.

        Args:
            shard: Number of the shard.
            start: The first sample.
            stop: The one after the last.
            through: A cache that is asked first. It is given the right bytes only; images may be views of what it has.

        Raises:
            UserError: The tar is not the one that was built or indexed, or a sample's label is of no class.
            PatchmillError: It cannot be read.
        """
        rows = self.rows(shard)
        here = range(*slice(start, stop).indices(len(rows)))
        starts, lengths = rows.offset[start:stop] - BLOCK, rows.size[start:stop] + BLOCK

        def fetch() -> list[bytes]:
            return self._read(rows, shard, here) if here else []

        if through:
            digest = hashlib.blake2b(
                f"{self.tars.url}/{self.paths[shard]} {self._sha256[shard].as_py()}".encode(), digest_size=20
            )
            digest.update(np.stack([starts, lengths]).astype("<i8").tobytes())
            found: list = [*through(digest.hexdigest(), lengths.tolist(), fetch)]
        else:
            found = fetch()
        for place, index in enumerate(here):  # in place: all bytes twice would be twice the memory
            found[place] = self._sample(rows, shard, index, found[place])
        return found

    def _read(self, rows: Rows, shard: int, indices: Sequence[int]) -> list[bytes]:
        """Return the bytes of samples in the tar, each with the tar header before it.

        A network may turn bits, and the next time others. So what came wrong from a remote store is asked for again,
        until it is right, or the same twice: then the tar itself is so. Of a damaged image the decoder tells.
        """
        places = {index: (int(rows.offset[index]) - BLOCK, int(rows.size[index]) + BLOCK) for index in indices}

        def ask(some: Iterable[int]) -> dict[int, bytes]:
            starts, lengths = zip(*(places[index] for index in some), strict=True)
            return dict(zip(some, self.tars.read_ranges(self.paths[shard], starts, lengths), strict=True))

        found = ask(indices)
        wrong = {} if self.tars.local else {i: data for i, data in found.items() if not rows.is_whole(i, data)}
        for _ in range(TRIES):
            if not wrong:
                break
            with self._lock:
                self._read_again += len(wrong)
            self.tars.forget(self.paths[shard])  # of a local store nothing is wrong
            again = ask(list(wrong))
            found |= again
            wrong = {i: data for i, data in again.items() if data != wrong[i] and not rows.is_whole(i, data)}
        if wrong:
            raise PatchmillError(
                f"{self.tars.url}/{self.paths[shard]} comes otherwise each time, {TRIES + 1} times, at byte "
                f"{places[min(wrong)][0]}; check the network and what is between this machine and the server"
            )
        for index, data in found.items():
            self._check(rows, shard, index, data)
        return list(found.values())

    def _check(self, rows: Rows, shard: int, index: int, data: bytes) -> None:
        """Raise a UserError unless bytes of the tar begin with the tar header of a sample."""
        if not rows.begins(index, data):
            raise UserError(
                f"{self.tars.url}/{self.paths[shard]} is not the tar that {self.url} knows: "
                f"{rows.keys[index].as_py()} is not at byte {rows.offset[index]}: the tars changed; "
                f"{self._remedy} again"
            )

    def _sample(self, rows: Rows, shard: int, index: int, data: bytes) -> Sample:
        """Return a sample of its bytes in the tar, which begin with the tar header."""
        key, labels = rows.keys[index].as_py(), rows.labels[index]
        if any(not 0 <= label < len(self.classes) for label in labels):  # before a device finds it, and says nothing
            raise UserError(
                f"sample {key} in {self.paths[shard]} of {self.url} has the label "
                f"{', '.join(map(str, labels))}, and there are {len(self.classes)} classes, counted from 0; "
                f"{self._remedy} again with the right list of classes"
            )
        weights = rows.weights[index] if rows.weights else ()
        place = shard, int(rows.index[index]), int(rows.offset[index])
        return Sample(key, data[BLOCK:], rows.format[index], labels, weights, *place)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample by its place among all kept samples; for looking around, not for training."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.read(shard, index - int(self._starts[shard]))

    def exclude_versions(self) -> list[str]:
        """Return the sorted names of the drop lists there are."""
        return [name.removesuffix(".parquet") for name in self.store.list(manifest.EXCLUDE)]


def _check_counts(sizes: np.ndarray, room: np.ndarray, dropped: np.ndarray, url: str, exclude: str | None) -> None:
    """Raise a UserError unless shards have counts, and what a drop list drops is in them, in order and once."""
    if ((sizes < 0) | (room < 0) | (sizes > room // BLOCK)).any():  # each sample has a header in the tar
        raise UserError(f"{url}/{manifest.SHARDS} is damaged (it has counts that no tar has); {manifest.REMEDY}")
    shard, index = dropped.astype(np.int64)
    inside = bool(((shard >= 0) & (shard < len(sizes)) & (index >= 0)).all()) and bool((index < sizes[shard]).all())
    steps = np.diff(shard), np.diff(index)
    if not (inside and ((steps[0] > 0) | (steps[0] == 0) & (steps[1] > 0)).all()):
        raise UserError(
            f"{url}/{manifest.exclude_path(str(exclude))} is damaged (it names samples that are not there, one "
            "twice, or not in order); make another drop list"
        )


def _subset(sizes: np.ndarray, samples: int, url: str) -> np.ndarray:
    """Return which shards, bool [shards], are in the subset of so many samples: as few as a hash puts first."""
    if not 0 < samples <= sizes.sum():
        raise UserError(
            f"subset of {url} is {samples:,} samples, and there are {sizes.sum():,}; give a number from 1 to that"
        )
    drawn = np.argsort(hash_array(hash_int(_SUBSET), np.arange(len(sizes))), kind="stable")
    before = np.cumsum(sizes[drawn]) - sizes[drawn]
    return np.isin(np.arange(len(sizes)), drawn[before < samples])


def _read_dropped(store: Store, exclude: str | None) -> np.ndarray:
    """Return (2, dropped) int32: shard and raw index of each dropped sample, sorted."""
    table = manifest.open_exclude(store, exclude)
    return np.stack([table["shard"].to_numpy(), table["index"].to_numpy()])


def _hint(store: Store) -> str:
    """Say why there is no data set here, as far as a look at the store tells."""
    parts = [part for part in ("train", "val") if store.exists(f"{part}/{manifest.DATASET}")]
    if parts:
        return f" itself, but in it: {' and '.join(parts)}; add the one you mean to the path"
    if store.exists(manifest.samples_path(0)):
        return ": making it never ended; run the same `patchmill shards build` or `index` again"
    return (
        f": {manifest.DATASET} is missing; make one with `patchmill shards build`, or with `patchmill shards index` "
        "for tars made elsewhere"
    )
