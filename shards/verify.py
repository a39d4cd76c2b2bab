"""Is a data set what its manifest says? Each tar is walked once and compared with its sample table."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table
from xxhash import xxh3_128_digest

from shards import manifest
from shards.dataset import Dataset
from shards.decode import DecodeError, decode
from shards.droplist import check_version, read_exclude, write_exclude
from shards.errors import PatchmillError, UserError
from shards.header import BrokenImageError, read_header
from shards.labels import ClassNames, LabelError, LabelRule, as_index
from shards.manifest import Info, Receipt
from shards.objects import MissingError, ShortError
from shards.progress import ImageProgress
from shards.store import Store, open_store
from shards.tarindex import Reading
from shards.tarscan import BLOCK, DamagedTarError, Member, TarSample, TarScan
from shards.workers import cores, run_jobs

SHOWN = 100  # faults in the table for the terminal
_IMAGES_A_WORKER = 2_000  # a process starts in the time that another checks these


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        reason: What.
        shard: Number, None where it is about the whole data set.
        tar: Its path.
        index: Raw place of the sample in the shard; None where it is no sample that can be dropped.
        key: Of the sample.
        offset: Byte in the tar.
        whole: No sample of the shard can be read.
    """

    reason: str
    shard: int | None = None
    tar: str = ""
    index: int | None = None
    key: str = ""
    offset: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Verified:
    """What a check found.

    Attributes:
        url: Of the data set.
        shards: That were read.
        samples: That were compared, those already dropped among them.
        bytes: Of all tars.
        decoded: Whether the images were decoded too.
        dropped: Samples that the drop list in use leaves out; what is wrong with them is no fault.
        faults: All of them, by shard.
        notes: What is wrong with tars of which all samples in use compared well: dropped ones are known to be damaged.
        faulty: Number of samples that are faulty, or in a shard that cannot be read.
        quarantine: Version of the drop list that was written, if any.
        unwritten: Why the drop list that was asked for could not be written, if so.
    """

    url: str
    shards: int
    samples: int
    bytes: int
    decoded: bool
    dropped: int
    faults: list[Fault]
    notes: list[Fault]
    faulty: int
    quarantine: str | None
    unwritten: str | None


@dataclass(frozen=True)
class _Job:
    """One shard to check; ``dropped`` are raw places of samples whose faults do not matter."""

    url: str
    shard: int
    samples: int
    decode: bool
    dropped: frozenset[int]


def verify(
    url: str | Path,
    *,
    decode: bool = False,
    exclude: str | None = None,
    quarantine: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Verified:
    """Compare every tar with what the manifest says: checksums, places, keys, labels, headers, counts.

    Of a tar that is cut short or damaged, the samples that can be read whole still are no faults; of one that is
    missing, or whose sample table is, all are.

    Args:
        url: Data set.
        decode: Decode every image whole, too.
        exclude: Drop list in use: its samples are bad already.
        quarantine: Name of a new drop list, of ``exclude`` and the faulty samples; running jobs keep theirs.
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: There is no data set, no such drop list, or ``quarantine`` exists.
        PatchmillError: The network failed, in spite of retries: that says nothing about the data.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    _manifest.cache_clear()  # it may have changed since the last call
    dataset = Dataset.open(url)
    if quarantine is not None:
        check_version(dataset, quarantine)
    dropped = read_exclude(url, exclude)
    by_shard: dict[int, set[int]] = {}
    for shard, index, _ in dropped:
        by_shard.setdefault(shard, set()).add(index)
    sizes = dataset.shard_sizes.tolist()
    jobs = [_Job(str(url), i, samples, decode, frozenset(by_shard.get(i, ()))) for i, samples in enumerate(sizes)]
    workers = workers or max(1, min(cores(), sum(sizes) // _IMAGES_A_WORKER))
    faults: dict[int, list[Fault]] = {}
    notes: dict[int, list[Fault]] = {}
    size = 0
    with ImageProgress("verifying", sum(sizes), rejected="faults", show=progress) as bar:
        for job, (found, noted, read) in run_jobs(check_shard, jobs, min(workers, len(jobs))):
            faults[job.shard], notes[job.shard] = found, noted
            size += read
            bar.advance(job.samples, read, len(found))
    listed = [*_check_totals(str(url)), *(fault for shard in sorted(faults) for fault in faults[shard])]
    noted = [note for shard in sorted(notes) for note in notes[shard]]
    bad = _samples(listed, sizes)
    for shard, index, _ in dropped:
        bad.pop((shard, index), None)
    unwritten = None
    if quarantine is not None:
        try:
            write_exclude(url, quarantine, [*dropped, *((*place, reason) for place, reason in bad.items())])
        except PatchmillError as error:  # hours of reading are not lost for that
            quarantine, unwritten = None, str(error)
    return Verified(
        dataset.url, len(jobs), sum(sizes), size, decode, len(dropped), listed, noted, len(bad), quarantine, unwritten
    )


def check_shard(job: _Job) -> tuple[list[Fault], list[Fault], int]:
    """Check one shard; return its faults, its notes and the bytes of its tar.

    A tar that is damaged stays so. Once the samples that this spoils are dropped, it is worth a note, no fault.
    """
    info, shards = _manifest(job.url)
    expected = {name: shards[name][job.shard].as_py() for name in shards.column_names}
    store = open_store(job.url)
    tars = open_store(info.tars) if info.tars else store
    path = manifest.samples_path(job.shard)

    def fault(reason: str, **where: Any) -> Fault:
        return Fault(reason, shard=job.shard, tar=expected["path"], **where)

    def unusable(reason: str, before: Sequence[Fault] = ()) -> tuple[list[Fault], list[Fault], int]:
        all_dropped = len(job.dropped) == job.samples
        last = fault(reason, whole=not all_dropped)
        return ([*before], [last], 0) if all_dropped else ([*before, last], [], 0)

    try:
        receipt = manifest.read_receipt(store, path)
        rows = manifest.open_table(store, path, manifest.SAMPLES_SCHEMA.names).to_pylist()
    except MissingError:
        return unusable(f"its sample table {path} is missing")
    except UserError as error:
        return unusable(f"its sample table: {error}")
    if len(rows) != expected["samples"]:
        return unusable(f"its sample table has {len(rows)} rows, {manifest.SHARDS} says {expected['samples']}")
    found = [
        fault(f"{name} is {getattr(receipt, name)} in its receipt, {expected[name]} in {manifest.SHARDS}")
        for name in ("sha256", "bytes", "samples")
        if getattr(receipt, name) != expected[name]
    ]
    check = _Check(info, rows, receipt, job)
    about: list[Fault] = []
    spoilt = False

    def take(compared: Iterator[tuple[str, dict]]) -> None:
        nonlocal spoilt
        for reason, where in compared:
            if where.get("index") in job.dropped:
                spoilt = True
            else:
                about.append(fault(reason, **where))

    try:
        scan = TarScan(tars, expected["path"], check.reading.wants, hashed=True)
        if scan.bytes != expected["bytes"]:
            about.append(fault(f"the tar has {scan.bytes} bytes, should have {expected['bytes']}"))
        try:
            take(check.walk(scan))
            if scan.sha256 != expected["sha256"]:
                about.append(fault(f"the tar's sha256 is {scan.sha256}, should be {expected['sha256']}"))
        except DamagedTarError as error:
            about.append(fault(str(error)))
            take(check.one_by_one(tars, expected["path"]))
    except MissingError:
        return unusable("the tar is missing", found)
    if spoilt and not any(each.key for each in about):  # what is left is about the tar as a whole
        return found, about, scan.bytes
    return [*found, *about], [], scan.bytes


@lru_cache(maxsize=1)
def _manifest(url: str) -> tuple[Info, pa.Table]:
    store = open_store(url)
    info = manifest.read_info(store)
    return info, manifest.open_table(store, manifest.SHARDS, manifest.SHARDS_SCHEMA.names)


class _Check:
    """The comparison of one tar with its table. Faults come as (reason, where in the words of ``Fault``)."""

    def __init__(self, info: Info, rows: list[dict], receipt: Receipt, job: _Job):
        indexed = info.build.get("source") == "index"
        self.reading = Reading.of(info) if indexed else Reading(LabelRule())
        self._number = ClassNames(info.classes).index if indexed else as_index  # what we build holds numbers alone
        self._classes = len(info.classes)
        self._rows, self._job = rows, job
        self._waiting = {row["offset"]: index for index, row in enumerate(rows)}
        self._twice = [index for index, row in enumerate(rows) if self._waiting[row["offset"]] != index]
        self._left_out = {key for key, _ in receipt.rejected}

    def walk(self, scan: TarScan) -> Iterator[tuple[str, dict]]:
        """Compare all samples of the tar."""
        for twice in self._twice:
            yield "another row of the sample table has the same place", self._where(twice)
        for sample in scan:
            places = [self._waiting.pop(member.offset, None) for member in sample.members]
            for member, index in zip(sample.members, places, strict=True):
                if index is not None and (reason := self._compare(self._rows[index], sample, member)):
                    yield reason, self._where(index)
            if all(index is None for index in places) and sample.key not in self._left_out:
                where = {"key": sample.key, "offset": sample.members[0].offset}
                yield "it is in the tar, but not in the sample table", where
        for left in self._waiting.values():
            yield "no file begins there in the tar", self._where(left)

    def one_by_one(self, tars: Store, path: str) -> Iterator[tuple[str, dict]]:
        """Compare what the walk did not reach, as training reads it."""
        for offset, index in self._waiting.items():
            row = self._rows[index]
            try:
                data = tars.read_range(path, offset - BLOCK, row["size"] + BLOCK)
            except ShortError:
                yield "the tar ends before its end", self._where(index)
                continue
            except PatchmillError as error:
                if not tars.local:
                    raise  # the network says nothing about the data, a disk does
                yield str(error), self._where(index)
                continue
            reason = self._compare_bytes(row, data[BLOCK:], zlib.crc32(data[:BLOCK]))
            if reason:
                yield reason, self._where(index)

    def _where(self, index: int) -> dict:
        return {"index": index, "key": self._rows[index]["key"], "offset": self._rows[index]["offset"]}

    def _compare(self, row: dict, sample: TarSample, member: Member) -> str:
        """Return what is wrong with a sample, or nothing."""
        if sample.key != row["key"]:
            return f"its key in the tar is {sample.key}"
        if member.size != row["size"]:
            return f"it has {member.size} bytes in the tar, {row['size']} in the table"
        if member.data is None:
            return f"a .{member.extension} stands there in the tar, no image"
        if reason := self._compare_bytes(row, member.data, member.header):
            return reason
        try:
            found = self.reading.label.find(sample.members)
            labels = [self._number(label) for label in found.labels]
        except LabelError as error:
            return f"its label: {error}"
        if labels != row["labels"]:
            return f"its labels in the tar are {labels}, {row['labels']} in the table"
        if not np.array_equal(_weights(found.weights, labels), _weights(row["weights"], labels)):
            return f"the weights of its labels are {found.weights} in the tar, {row['weights']} in the table"
        return ""

    def _compare_bytes(self, row: dict, image: bytes, header: int) -> str:
        if header != row["member"]:
            return "the tar header before it is another one"
        if xxh3_128_digest(image) != row["xxh128"]:
            return "its bytes changed: their hash is another one"
        if any(label >= self._classes for label in row["labels"] or ()):
            return f"labels {row['labels']}, but there are {self._classes} classes"
        try:
            found = read_header(image)
            seen, said = (found.format, found.width, found.height), (row["format"], row["width"], row["height"])
            if seen != said:
                return "it is {} of {} x {}, not {} of {} x {}".format(*seen, *said)
            if self._job.decode:
                decode(image, row["key"])
        except BrokenImageError as error:
            return str(error)
        except DecodeError as error:
            return f"it does not decode: {error.__cause__}"
        return ""


def _weights(weights: list[float] | None, labels: list) -> np.ndarray:
    return np.array(weights or [1] * len(labels), np.float32)


def _check_totals(url: str) -> list[Fault]:
    info, shards = _manifest(url)
    sums = {"samples": shards["samples"], "bytes": shards["bytes"]}
    found = {name: sum(column.to_pylist()) for name, column in sums.items()} | {"shards": len(shards)}
    wrong = [
        Fault(f"{manifest.DATASET} says {getattr(info, name)} {name}, {manifest.SHARDS} {value}")
        for name, value in found.items()
        if getattr(info, name) != value
    ]
    return wrong + [
        Fault("it is not in the manifest, but readers of shards/*.tar would read it; remove it", tar=tar)
        for tar in _strays(open_store(url), info, shards["path"].to_pylist())
    ]


def _strays(store: Store, info: Info, paths: list[str]) -> list[str]:
    """Return the tars in the folder of a data set that was built here, beyond those of its manifest."""
    if info.build.get("source") == "index" or store.web:
        return []
    return sorted({f"shards/{name}" for name in store.list("shards") if name.endswith(".tar")} - set(paths))


def _samples(faults: list[Fault], sizes: list[int]) -> dict[tuple[int, int], str]:
    """Return the first reason of each faulty sample, by shard and raw index."""
    bad: dict[tuple[int, int], str] = {}
    for fault in faults:
        if fault.shard is not None:
            for index in range(sizes[fault.shard]) if fault.whole else [fault.index]:
                if index is not None:
                    bad.setdefault((fault.shard, index), fault.reason)
    return bad


def render(found: Verified) -> Table:
    """Return the table to print on a terminal with rich."""
    table = Table("tar", "key", "byte", "fault", title=found.url)
    for fault in found.faults[:SHOWN]:
        offset = "" if fault.offset is None else f"{fault.offset:,}"
        table.add_row(fault.tar, fault.key, offset, fault.reason + " (all its samples)" * fault.whole)
    if len(found.faults) > SHOWN:
        table.add_row("...", "", "", f"and {len(found.faults) - SHOWN:,} more; --json lists all")
    return table
