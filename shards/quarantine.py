"""Samples that could not be decoded: a JSON line each, in a file that all ranks of a run share."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shards.dataset import Dataset, Sample, read_exclude, write_exclude
from shards.errors import PatchmillError, UserError


class Quarantine:
    """Notes each sample once, however often, by whatever rank and after whatever restart it is met.

    Args:
        path: The file; it need not exist.
        dataset: Whose samples are noted.
    """

    def __init__(self, path: str | os.PathLike, dataset: Dataset):
        self._path, self._dataset = Path(path), dataset
        self._known: set[tuple[int, int]] = set()
        self._read = 0  # bytes of the file that ``_known`` is from

    def add(self, sample: Sample, position: int, reason: str) -> None:
        """Note a sample, and the global position at which it was to come.

        Raises:
            PatchmillError: The file cannot be written.
        """
        place = sample.shard, sample.index
        if place in self._known:
            return
        entry = {
            "position": position,
            "key": sample.key,
            "shard": sample.shard,
            "tar": self._dataset.paths[sample.shard],
            "index": sample.index,  # raw: dropped samples count
            "offset": sample.offset,
            "reason": reason,
        }
        try:
            self._append(place, json.dumps(entry).encode())
        except OSError as error:
            raise PatchmillError(
                f"cannot write {self._path}: {error.strerror}; make room or mend the disk, then run again"
            ) from error

    def _append(self, place: tuple[int, int], line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a+b") as file, _locked(file):
            file.seek(self._read)
            lines = file.read()
            half = lines.rpartition(b"\n")[2]  # of a process that was killed
            self._read += len(lines) - len(half)
            self._known |= {(each["shard"], each["index"]) for each in _entries(lines)}
            if place not in self._known:
                file.write(b"\n" * bool(half) + line + b"\n")
                self._known.add(place)

    def commit(self) -> None:
        """Make durable what is noted."""
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
        if missing := {"position", "key", "shard", "index", "offset", "reason"} - entry.keys():
            raise UserError(f"{path} has an entry without {min(missing)}: {entry}; it is of an older Patchmill")
    return entries


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
        files: Quarantine files of runs on it.
        version: Name of the new drop list.
        exclude: Older drop list, which the new one takes in.

    Returns:
        Samples that are new on the list, and those of the older one.

    Raises:
        UserError: There is nothing to drop, a file is of another data set, or as ``write_exclude``.
    """
    dataset = Dataset.open(url)
    old = read_exclude(url, exclude)
    known = {(shard, index) for shard, index, _ in old}
    new: dict[tuple[int, int], str] = {}
    for file in files:
        entries = read_quarantine(file)
        if not entries:
            raise UserError(f"{file} names no sample; give the quarantine.jsonl of a run that met broken images")
        for entry in entries:
            shard, index = place = entry["shard"], entry["index"]
            there = 0 <= shard < len(dataset.raw_sizes) and 0 <= index < dataset.raw_sizes[shard]
            rows = dataset.rows(shard) if there else None
            if rows is None or (rows.keys[index].as_py(), rows.offset[index]) != (entry["key"], entry["offset"]):
                raise UserError(
                    f"{file} is of another data set than {url}, where sample {index} of shard {shard} is not "
                    f"{entry['key']} at byte {entry['offset']}; give the data set of the run"
                )
            if place not in known:
                new.setdefault(place, entry["reason"])
    write_exclude(url, version, [*old, *((*place, reason) for place, reason in new.items())])
    return len(new), len(old)
