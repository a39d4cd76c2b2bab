"""Tars that are WebDataset shards already: to be shuffled, split, re-encoded or cut anew.

Each tar is walked once, by its headers and the small members with labels; what was found is kept beside the build, so
that slices on one file system share the work, and a killed build need not do it again.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from shards.classes import name_classes, read_classes
from shards.errors import UserError
from shards.header import BrokenImageError
from shards.labels import LabelError, LabelRule
from shards.sources import Item, Source, clean_key, columns
from shards.sources.unpack import harmless, look, unpack
from shards.store import Store, open_store
from shards.tarindex import NoImageError, Reading, TwiceError
from shards.tarlist import find_tars
from shards.tarscan import TarScan
from shards.workers import cores, run_jobs

TARS = 16  # to go through, for one more process to pay


class Tars(Source):
    """The images of WebDataset tars, under the same keys. Other members than image and labels are not kept.

    Where two tars have a key in common, as those that number their samples anew, all keys get the tar's name before
    them: ``00017/000003`` of ``00017.tar``.

    Args:
        url: A folder, a pattern such as ``x-{000..146}.tar``, or one tar.
        unpacked: Where it is kept what the tars hold.
        label: Where labels stand, ``EXTENSION`` or ``EXTENSION:FIELD``; by default in ``cls``, or else in ``json``.
        image: Extension of the image, where a sample has several.
        classes: File with the name of a class a line. Otherwise the classes are all names found, sorted, or numbers.

    Raises:
        UserError: There are no tars, some are damaged, or labels cannot be understood.
    """

    kind = "tars"

    def __init__(self, url: str, unpacked: Path, *, label: str = "", image: str = "", classes: str = ""):
        self.url = url
        store, self._paths = find_tars(url)
        self.root = store.url
        self.others: dict[str, int] = {}
        reading = Reading(LabelRule.parse(label), image.lower().removeprefix("."))
        self._jobs = [_Job(store.url, path, unpacked, reading) for path in self._paths]
        for _ in run_jobs(_scan_if_free, self._jobs, min(cores(), len(self._jobs) // TARS)):
            pass
        found, self.multi_label = set(), False
        hashes = array("Q")  # of the keys: 8 bytes a sample
        for job in self._jobs:
            table = _waited(job)
            hashes.frombytes(np.unique(table["hash"].to_numpy()).tobytes())
            for labels, weights, broken in _labels(table):
                found.update(labels)
                self.multi_label = self.multi_label or bool(weights) or not (broken or len(labels) == 1)
        self._prefixed = _has_twins(np.frombuffer(hashes, np.uint64))
        self.classes = read_classes(classes) if classes else name_classes(dict.fromkeys(found, url))
        self._number = columns.number_labels(found, self.classes, url)

    def items(self) -> Iterator[Item]:
        """Yield the images tar by tar, in the order of the tar."""
        others: Counter[str] = Counter()
        for job in self._jobs:
            table = _waited(job)
            others.update(json.loads(table.schema.metadata[b"others"]))
            changed = look(open_store(self.root), job.path).changed
            prefix = f"{clean_key(job.path)}/" if self._prefixed else ""
            rows = zip(*(table[name].to_pylist() for name in ("key", "offset", "size")), _labels(table), strict=True)
            for key, offset, size, (labels, weights, broken) in rows:
                numbers = tuple(self._number[label] for label in labels)
                if len(set(numbers)) < len(numbers):
                    raise UserError(f"{self.root}/{job.path}: {key} has one class twice, {labels}; mend the labels")
                yield Item(prefix + key, job.path, offset, size, numbers, weights, changed, broken=broken)
        self.others = dict(sorted(others.items()))


@dataclass(frozen=True)
class _Job:
    """One tar to walk through."""

    root: str
    path: str
    unpacked: Path
    reading: Reading

    def table(self, wait: bool = True) -> pa.Table | None:
        """Return what the tar holds: a row a sample."""
        store = open_store(self.root)
        settings = json.dumps(self.reading.settings, sort_keys=True)
        name = f"{harmless(self.path)}-{harmless(settings)[-8:]}"
        return unpack(self.unpacked, name, look(store, self.path), lambda _: self._walk(store, _), wait)

    def _walk(self, store: Store, _: BinaryIO) -> pa.Table:
        rows: dict[str, list] = {name: [] for name in _SCHEMA.names}
        others: Counter[str] = Counter()
        scan = TarScan(store, self.path, self.reading.label.wants)
        labels: list[Any]
        for sample in scan:
            try:
                image = self.reading.image_of(sample.members)
                found = self.reading.label.find(sample.members)
            except LabelError as error:
                raise UserError(
                    f"{scan.name}: the labels of {sample.key} make no sense: {error}; say where labels stand, as in "
                    "label=json:FIELD"
                ) from error
            except NoImageError:
                others["samples without image"] += 1
                continue
            except TwiceError as error:
                place, labels = (sample.members[0].offset, 0), [[], [], str(error)]
            except BrokenImageError as error:
                raise UserError(f"{scan.name}: {sample.key} has {error}; as in image=jpg") from error
            else:
                place, labels = (image.offset, image.size), [found.labels, found.weights, ""]
            key = clean_key(f"{sample.key}.")
            row = (key, xxh3_64_intdigest(key.encode()), *place, json.dumps(labels))
            for column, value in zip(rows.values(), row, strict=True):
                column.append(value)
        return pa.table(rows, _SCHEMA.with_metadata({"others": json.dumps(others + scan.skipped)}))


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("hash", pa.uint64()),  # of the key
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("labels", pa.string()),  # JSON: labels, weights, and why the sample cannot be used
    ]
)


def _scan_if_free(job: _Job) -> None:
    """Walk through a tar, unless that is done or another process is at it."""
    job.table(wait=False)


def _waited(job: _Job) -> pa.Table:
    table = job.table()
    assert table is not None  # it was waited for
    return table


def _labels(table: pa.Table) -> Iterator[tuple[list[int | str], tuple[float, ...], str]]:
    for text in table["labels"].to_pylist():
        labels, weights, broken = json.loads(text)
        yield labels, tuple(weights), broken


def _has_twins(hashes: np.ndarray) -> bool:
    """Tell whether a hash is there twice, and sort them. Of 300 million different keys two share one by 1 in 400."""
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())
