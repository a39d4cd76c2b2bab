"""A data set at rest: opening costs O(shards), sample rows are read lazily, shard by shard."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from shards import manifest
from shards.errors import UserError
from shards.store import MissingError, Store, open_store

ROW_COLUMNS = ["key", "offset", "size", "format", "labels", "width", "height"]
CACHED_ROWS = 4_000_000  # kept in memory per open data set: about 50 to 100 bytes each


class Sample(NamedTuple):
    """One encoded image: ``format`` is jpg, png or webp, ``labels`` are class indices."""

    key: str
    image: bytes
    format: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """The kept samples of one shard, in tar order; ``n`` below is their number.

    Attributes:
        offset: (n,) int64, first byte of the image in the tar.
        size: (n,) int64, bytes of the image.
        width: (n,) int32, pixels, as in the image's header (EXIF orientation not applied).
        height: (n,) int32, pixels.
        format: n strings: jpg, png or webp.
        labels: n tuples of class indices.
        keys: n strings in compact form; ``key`` is the same as a list.
    """

    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    format: list[str]
    labels: list[tuple[int, ...]]
    keys: pa.ChunkedArray

    @cached_property
    def key(self) -> list[str]:
        """The n keys of the samples."""
        return self.keys.to_pylist()

    def __len__(self) -> int:
        return len(self.offset)


class Dataset:
    """A data set, less the samples of one drop list. Made by ``Dataset.open``; safe to share between threads.

    Attributes:
        url: Where it is.
        exclude: The version of the drop list in use, or None.
        classes: Class names; labels index into them.
        digest: Hex digest of classes, shard contents and dropped samples.
        shard_sizes: (shards,) int64, kept samples a shard.
        mean_bytes: Mean size of an image in bytes, before dropping.
        store: Where its bytes are read; ``store.local`` tells whether reads are cheap one by one.
    """

    def __init__(self, store: Store, info: manifest.Info, shards: pa.Table, exclude: str | None, dropped: np.ndarray):
        self.store, self.url, self.exclude = store, store.url, exclude
        self.classes = info.classes
        self.mean_bytes = info.image_bytes / info.samples
        self._paths = shards["path"].to_pylist()
        self._raw_sizes = shards["samples"].to_numpy()
        self._dropped = dropped[1]
        self._dropped_starts = np.searchsorted(dropped[0], np.arange(info.shards + 1))
        self.shard_sizes = self._raw_sizes - np.diff(self._dropped_starts)
        self.digest = info.digest if exclude is None else manifest.digest_with_exclude(info.digest, *dropped)
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        per_shard = max(1, info.samples // info.shards)
        self._cached_rows = lru_cache(maxsize=max(64, CACHED_ROWS // per_shard))(self._read_rows)

    @classmethod
    def open(cls, url: str | Path, exclude: str | None = None) -> "Dataset":
        """Open the data set at ``url``, leaving out the samples of drop list ``exclude``.

        Reads ``dataset.json``, ``shards.parquet`` and the drop list, nothing of the samples.

        Raises:
            UserError: There is no whole data set at ``url``, or no such drop list.
        """
        store = open_store(url)
        try:
            info = manifest.parse_info(store.read(manifest.DATASET), store.url)
        except MissingError as error:
            raise UserError(f"no data set at {store.url}{_hint(store)}") from error
        shards = manifest.read_table(store.read(manifest.SHARDS))
        if manifest.digest(info.classes, shards["sha256"].to_pylist()) != info.digest:
            raise UserError(f"{store.url}: dataset.json and shards.parquet do not belong together; build it again")
        return cls(store, info, shards, exclude, _read_dropped(store, exclude))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, shard: int) -> Rows:
        """Return the kept samples of a shard; those of the shards used last stay in memory."""
        return self._cached_rows(shard)

    def _read_rows(self, shard: int) -> Rows:
        path = manifest.samples_path(shard)
        table = manifest.read_table(self.store.read(path), columns=ROW_COLUMNS)
        if len(table) != self._raw_sizes[shard]:
            raise UserError(
                f"{self.url}/{path} has {len(table)} rows, shards.parquet says {self._raw_sizes[shard]}; "
                "copy or build the data set again"
            )
        keep = np.ones(len(table), dtype=bool)
        keep[self._dropped[self._dropped_starts[shard] : self._dropped_starts[shard + 1]]] = False
        table = table.filter(pa.array(keep))
        tuples: dict[tuple, tuple] = {}  # one object for each distinct tuple
        labels = (tuple(labels) for labels in table["labels"].to_pylist())
        return Rows(
            offset=table["offset"].to_numpy(),
            size=table["size"].to_numpy(),
            width=table["width"].to_numpy(),
            height=table["height"].to_numpy(),
            format=[sys.intern(name) for name in table["format"].to_pylist()],
            labels=[tuples.setdefault(each, each) for each in labels],
            keys=table["key"],
        )

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample by its place among the kept samples of a shard."""
        rows = self.rows(shard)
        image = self.store.read_range(self._paths[shard], int(rows.offset[index]), int(rows.size[index]))
        return Sample(rows.keys[index].as_py(), image, rows.format[index], rows.labels[index])

    def read_many(self, shard: int, start: int, stop: int) -> list[Sample]:
        """Read consecutive kept samples of a shard; on a remote store with as few requests as possible."""
        rows = self.rows(shard)
        here = slice(start, stop)
        images = self.store.read_ranges(self._paths[shard], rows.offset[here].tolist(), rows.size[here].tolist())
        keys = rows.keys[here].to_pylist()
        return [Sample(*each) for each in zip(keys, images, rows.format[here], rows.labels[here], strict=True)]

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


def check_exclude_name(version: str) -> None:
    """Raise a UserError unless ``version`` is a name that a drop list can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", version):
        raise UserError(f"drop list name {version!r}: use letters, digits, dots, dashes and underscores")


def write_exclude(folder: str | Path, version: str, rows: Iterable[tuple[int, int, str]]) -> None:
    """Write a drop list of a local data set, for ``Dataset.open(folder, exclude=version)``.

    Args:
        folder: The data set.
        version: A new name; a drop list never changes once written.
        rows: (shard, raw index in the shard, reason) of each sample to drop.

    Raises:
        UserError: The version exists, its name is no plain word, or a row names no sample or one twice.
    """
    check_exclude_name(version)
    dataset = Dataset.open(folder)
    path = Path(folder) / manifest.exclude_path(version)
    if path.exists():
        raise UserError(f"drop list {version} of {folder} exists and never changes; choose another name")
    rows = sorted(rows)
    for shard, index, _ in rows:
        if not (0 <= shard < len(dataset.shard_sizes) and 0 <= index < dataset.shard_sizes[shard]):
            raise UserError(f"drop list {version}: {folder} has no sample {index} in shard {shard}; count from 0")
    for (shard, index, _), following in pairwise(rows):
        if following[:2] == (shard, index):
            raise UserError(f"drop list {version}: sample {index} of shard {shard} is listed twice; drop it once")
    columns = [[row[i] for row in rows] for i in range(3)]
    manifest.write_table(
        dataset.store, manifest.exclude_path(version), pa.table(columns, schema=manifest.EXCLUDE_SCHEMA)
    )


def _read_dropped(store: Store, exclude: str | None) -> np.ndarray:
    """Return (2, dropped) int32: shard and raw index of each dropped sample, sorted."""
    if exclude is None:
        return np.zeros((2, 0), np.int32)
    try:
        table = manifest.read_table(store.read(manifest.exclude_path(exclude)), columns=["shard", "index"])
    except MissingError as error:
        raise UserError(
            f"{store.url} has no drop list {exclude!r}; there is no manifest/exclude/{exclude}.parquet"
        ) from error
    return np.stack([table["shard"].to_numpy(), table["index"].to_numpy()])


def _hint(store: Store) -> str:
    """Say why there is no data set here, as far as a look at the store tells."""
    parts = [part for part in ("train", "val") if store.exists(f"{part}/{manifest.DATASET}")]
    if parts:
        return f" itself, but in it: {' and '.join(parts)}; add the one you mean to the path"
    if store.exists(manifest.samples_path(0)):
        return ": its build never ended; run the same `patchmill shards build` again"
    return f": {manifest.DATASET} is missing; make one with `patchmill shards build`"
