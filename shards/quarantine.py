"""Samples that could not be decoded: a JSON line each, in a file that all ranks of a run share."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.dataset import Dataset, Sample
from shards.droplist import read_exclude, write_exclude
from shards.errors import PatchmillError, UserError
from shards.mixture import Mixture
from shards.store import absolute

Place = tuple[int, int, int]
"""Number of the data set in a mixture, shard in that, raw index in the shard: dropped samples count."""

_FIELDS = {"position", "key", "data", "source", "shard", "index", "offset", "reason"}  # that are needed
_NUMBERS = ("position", "source", "shard", "index")


class Quarantine:
    """Notes each sample once, however often, by whatever rank and after whatever restart it is met.

    Args:
        path: The file, which need not exist; None to note in memory only.
        dataset: Whose samples are noted.

    Attributes:
        met: Samples that this process noted or tried to.
    """

    def __init__(self, path: str | os.PathLike | None, dataset: Dataset | Mixture):
        self._path, self._datasets = Path(path) if path else None, dataset.datasets
        self._first_shards = np.cumsum([0, *(len(each.shard_sizes) for each in self._datasets)])
        self.met: set[Place] = set()
        self._listed: set[Place] = set()
        self._read = 0  # bytes of the file that ``_listed`` is from

    def add(self, sample: Sample, position: int, reason: str) -> None:
        """Note a sample, and the global position at which it was to come.

        Raises:
            PatchmillError: The file cannot be written.
        """
        source = int(np.searchsorted(self._first_shards, sample.shard, side="right")) - 1
        shard = sample.shard - int(self._first_shards[source])
        place = source, shard, sample.index
        self.met.add(place)
        if self._path is None or place in self._listed:
            return
        entry = {
            "position": position,
            "key": sample.key,
            "data": absolute(self._datasets[source].url),
            "source": source,
            "shard": shard,
            "tar": self._datasets[source].paths[shard],
            "index": sample.index,
            "offset": sample.offset,
            "reason": reason,
        }
        try:
            self._append(place, json.dumps(entry).encode())
        except OSError as error:
            raise PatchmillError(
                f"cannot write {self._path}: {error.strerror}; make room or mend the disk, then run again"
            ) from error

    def _append(self, place: Place, line: bytes) -> None:
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a+b") as file, _locked(file):
            file.seek(self._read)
            lines = file.read()
            half = lines.rpartition(b"\n")[2]  # of a process that was killed
            self._read += len(lines) - len(half)
            self._listed |= {place_of(entry) for entry in _entries(lines) if entry.keys() >= _FIELDS}
            if place not in self._listed:
                file.write(b"\n" * bool(half) + line + b"\n")
                self._listed.add(place)

    def commit(self) -> None:
        """Make durable what is noted."""
        if self._path:
            with suppress(FileNotFoundError), open(self._path, "rb+") as file:
                os.fsync(file.fileno())


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Let one process at a time look and append, where the file system knows locks."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file unlocks it


def read_quarantine(path: str | os.PathLike) -> list[dict]:
    """Return the entries of a quarantine file, none if there is no file; half a line, left by a kill, is passed over.

    Raises:
        UserError: An entry lacks a field.
    """
    try:
        entries = list(_entries(Path(path).read_bytes()))
    except FileNotFoundError:
        return []
    for entry in entries:
        if missing := _FIELDS - entry.keys():
            raise UserError(f"{path} has an entry without {min(missing)}: {entry}; it is no quarantine list of a run")
        if not all(type(entry[each]) is int and abs(entry[each]) < 2**63 for each in _NUMBERS):
            raise UserError(f"{path} has an entry without numbers: {entry}; it is no quarantine list of a run")
    return entries


def place_of(entry: dict) -> Place:
    """Return the place of an entry's sample."""
    return entry["source"], entry["shard"], entry["index"]


def _entries(lines: bytes) -> Iterator[dict]:
    for line in lines.splitlines():
        with suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                yield entry


def drop_quarantined(
    url: str | Path, files: Iterable[str | Path], version: str, exclude: str | None = None
) -> tuple[int, int]:
    """Write a new drop list of the samples that runs could not decode.

    Args:
        url: The data set.
        files: Quarantine files of runs on it, or on mixtures with it.
        version: Name of the new drop list.
        exclude: Older drop list, which the new one takes in.

    Returns:
        Samples that are new on the list, and those of the older one.

    Raises:
        UserError: There is nothing to drop, a file is missing or of another data set, or as ``write_exclude``.
    """
    dataset = Dataset.open(url)
    old = read_exclude(url, exclude)
    dropped = {(shard, index) for shard, index, _ in old}
    new: dict[tuple[int, int], str] = {}
    for file in files:
        for entry in _of_dataset(file, url):
            shard, index = entry["shard"], entry["index"]
            there = 0 <= shard < len(dataset.raw_sizes) and 0 <= index < dataset.raw_sizes[shard]
            rows = dataset.rows(shard) if there else None
            if rows is None or (rows.keys[index].as_py(), rows.offset[index]) != (entry["key"], entry["offset"]):
                raise UserError(
                    f"{file} is of another data set than {url}, where sample {index} of shard {shard} is not "
                    f"{entry['key']} at byte {entry['offset']}; give the data set of the run"
                )
            if (shard, index) not in dropped:
                new.setdefault((shard, index), entry["reason"])
    write_exclude(url, version, [*old, *((*place, reason) for place, reason in new.items())])
    return len(new), len(old)


def _of_dataset(file: str | Path, url: str | Path) -> list[dict]:
    """Return the entries of a data set, which may have moved unless the run had several."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}; check the path (runs that meet no broken image write none)")
    entries = read_quarantine(file)
    sources = sorted({entry["data"] for entry in entries})
    mine = entries if len(sources) == 1 else [entry for entry in entries if entry["data"] == absolute(url)]
    if not mine:
        named = f"samples of {' and '.join(sources)} only" if sources else "no sample"
        raise UserError(f"{file} names {named}; give the quarantine.jsonl of a run that met broken images of {url}")
    return mine
