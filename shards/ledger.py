"""What was really delivered: for each position, the sample that a reader put into the row; one compact file a rank.

Every start of a run writes a segment, a folder that no later start touches::

    ledger/000000/rank-00000.ledger ...    the first start
    ledger/000001/rank-00000.ledger ...    gone on from one of its checkpoints, on any number of ranks

A file is frames, one behind the other; what is behind the last whole one was cut short by a kill, and is no part of it.
The first frame is JSON: what the run reads, at which position the segment begins, and after which segment. Each other
frame holds the samples of consecutive steps, compressed.

So the samples behind some weights are a chain. A checkpoint names a segment and the position where it stood; that
segment tells where it begins and which one delivered what was before. What came past such a point is in no weights.
"""

import json
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from shards.atomic import fsync_folder
from shards.batch import Work
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.mixedorder import MixedOrder
from shards.mixture import Mixture
from shards.order import Order
from shards.store import absolute

FORMAT = 1
FRAME_ROWS = 1 << 16  # kept in memory until then or until a checkpoint: what a kill loses is in no weights
MOST_RANKS = 1 << 16  # that a file is believed to be one of
DENSEST = 1 << 15  # bytes that one of a frame can stand for: a block of zstd, 128 KiB, takes 4 at least
_MAGIC = b"PMLG"
_HEAD = struct.Struct("<4sIIqIIII")  # magic, CRC-32 of the rest and what follows, bytes that follow; then as in Frame
_CHECKED = 8  # where in a head begins what the CRC is of
_NEAR = 6  # a lane's samples are near each other: all but the last 6 bits of places take few values, kept in a table


class Frame(NamedTuple):
    """The samples of consecutive steps of one rank: row i is of position ``first + i * world_size``.

    Attributes:
        first: Position of the first row.
        step: Rows a step.
        shard: int64 [rows].
        index: int64 [rows], raw place in the shard: dropped samples count.
        replaced: int32 [k, 3], of each row with a stand-in: the row, and shard and raw place of the broken sample.
    """

    first: int
    step: int
    shard: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # of a tuple it is a method
    replaced: np.ndarray


class BrokenLedgerError(PatchmillError):
    """A file of a ledger is not as it was written."""


def new_segment(folder: str | os.PathLike) -> Path:
    """Make the folder of a new segment in the ledger ``folder``; one rank calls it and tells the others."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=-1)
    number = last
    while True:
        number += 1
        try:
            (folder / f"{number:06d}").mkdir()
        except FileExistsError:
            continue  # some network file systems show a folder late
        fsync_folder(folder)
        return folder / f"{number:06d}"


def keep_number(folder: str | os.PathLike, segment: str | None) -> None:
    """Leave its number to a segment that a run goes on from and that lies elsewhere: no new one gets it."""
    if segment is not None:
        (Path(folder) / segment).mkdir(parents=True, exist_ok=True)


class Ledger:
    """Writes one rank's file of a segment; of another one each time the stream is set to another place.

    A checkpoint may be taken while another thread fetches the next batch.

    Args:
        segment: Folder from ``new_segment``, the same on all ranks.
        dataset: What the run reads, one data set or a mixture.
        order: In which order.
        rank: Of this process.
        world_size: Number of ranks.

    Raises:
        PatchmillError: From any method: a file cannot be written.
        UserError: From ``append``: another process writes to the same file.
    """

    def __init__(
        self,
        segment: str | os.PathLike,
        dataset: Dataset | Mixture,
        order: Order | MixedOrder,
        rank: int,
        world_size: int,
    ):
        self._first_segment = Path(segment)
        self._run = {
            "data": [absolute(each.url) for each in dataset.datasets],
            "exclude": [each.exclude for each in dataset.datasets],
            "order": order.identity(dataset.digest),
        }
        if any(each.subset for each in dataset.datasets):
            self._run["subset"] = [each.subset for each in dataset.datasets]
        self._rank, self._world_size = rank, world_size
        self._file: BinaryIO | None = None
        self._segments = 0  # begun
        self._after: str | None = None
        self._next = -1  # this rank's next position unless the stream is set
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        self._replaced: list[tuple[int, int, int]] = []
        self._at = self._rows = 0  # first position and number of rows in memory
        self._lock = threading.RLock()

    @property
    def segment(self) -> str | None:
        """Name of the segment that delivered the last sample."""
        return self._path.parent.name if self._file else self._after

    @property
    def _path(self) -> Path:
        name = self._first_segment.name + (f".{self._segments}" if self._segments > 1 else "")
        return rank_path(self._first_segment.with_name(name), self._rank)

    def go_on_from(self, segment: str | None) -> None:
        """Begin another segment with the next step: the stream was set to where ``segment`` stood."""
        with self._lock:
            self.flush()
            if self._file:
                self._file.close()
            self._file, self._after = None, segment

    def append(self, position: int, work: Work) -> None:
        """Note a step that is handed out; ``position`` is the first of its global batch."""
        first, rows = int(work.positions[0]), len(work.positions)
        with self._lock:
            if self._file and first != self._next:
                self.go_on_from(self.segment)
            if not self._file:
                self._begin(position)
            if self._steps and rows != len(self._steps[0][0]):
                self.flush()
            if not self._steps:
                self._at = first
            self._replaced += [(self._rows + row, broken.shard, broken.index) for row, broken in work.replaced.items()]
            self._steps.append((work.shards, work.indices))
            self._rows += rows
            self._next = first + rows * self._world_size
            if self._rows >= FRAME_ROWS:
                self.flush()

    def flush(self) -> None:
        """Hand what is in memory to the system."""
        with self._lock:
            if not self._steps:
                return
            shard, index = (np.concatenate(column) for column in zip(*self._steps, strict=True))
            replaced = np.array(self._replaced, dtype=np.int32).reshape(-1, 3)
            self._write(_pack(Frame(self._at, len(self._steps[0][0]), shard, index, replaced)))
            self._steps, self._replaced, self._rows = [], [], 0

    def commit(self) -> None:
        """Make all durable that was noted."""
        with self._lock:
            self.flush()
            if self._file:
                with self._told():
                    os.fsync(self._file.fileno())

    def _begin(self, position: int) -> None:
        self._segments += 1
        head = {
            "format": FORMAT,
            "begins": position,
            "after": self._after,
            "rank": self._rank,
            "world_size": self._world_size,
            "run": self._run,
        }
        with self._told():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file = open(self._path, "xb")  # noqa: SIM115 (open as long as the segment)
            except FileExistsError:
                raise UserError(
                    f"{self._path} exists: another process writes this rank's part of the ledger, or wrote it in an "
                    "older start; give each start a folder of its own (shards.ledger.new_segment)"
                ) from None
            fsync_folder(self._path.parent)
            fsync_folder(self._path.parent.parent)
        self._write(_frame((0, 0, 0, 0, 0), json.dumps(head).encode()))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        with self._told():
            self._file.write(data)
            self._file.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PatchmillError(
                f"cannot write {self._path}: {error.strerror}; make room or mend the disk, then run again"
            ) from error


def rank_path(segment: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return segment / f"rank-{rank:05d}.ledger"


def _frame(fields: tuple[int, ...], data: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, 0, len(data), *fields)[_CHECKED:]
    return _MAGIC + struct.pack("<I", zlib.crc32(data, zlib.crc32(head))) + head + data


def _pack(frame: Frame) -> bytes:
    place = frame.shard.astype(np.int64) << 32 | frame.index
    near, code = np.unique(place >> _NEAR, return_inverse=True)
    inside = place & ((1 << _NEAR) - 1)
    columns = code.astype(_code_type(len(near))), inside.astype("u1"), near.astype("<i8"), frame.replaced.astype("<i4")
    zstd = pa.Codec("zstd", compression_level=3)
    data = zstd.compress(b"".join(column.tobytes() for column in columns), asbytes=True)
    return _frame((frame.first, frame.step, len(place), len(near), len(frame.replaced)), data)


def _code_type(near: int) -> str:
    return "<u2" if near <= 1 << 16 else "<u4"


class RankFile:
    """One rank's file of a segment, for reading.

    Attributes:
        path: Where it is.
        head: The JSON in it, as ``Ledger`` wrote it.
        first: int64 [frames], position of the first row of each frame.
        last: int64 [frames], and of the last.
        offset: int64 [frames], where each frame begins in the file.
        end: Where the last whole frame ends.
        torn: Whether more follows.

    Raises:
        BrokenLedgerError: It cannot be read, or has no head; a newer Patchmill wrote it.
    """

    def __init__(self, path: Path):
        self.path = path
        found: list[tuple[int, int, int]] = []
        try:
            with open(path, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                _, data = _read(file, 0, end)
                self.head = json.loads(data)
                if self.head["format"] > FORMAT:
                    raise BrokenLedgerError(f"{path} is of a newer Patchmill (format {self.head['format']})")
                _check_head(self.head)
                self.end = _HEAD.size + len(data)
                while (fields := _head(file, self.end, end)) is not None:
                    size, first, _, rows, *_ = fields
                    found.append((first, first + (rows - 1) * self.head["world_size"], self.end))
                    self.end += _HEAD.size + size
                self.torn = self.end < end
            self.first, self.last, self.offset = np.array(found, dtype=np.int64).reshape(-1, 3).T
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BrokenLedgerError(f"{path} cannot be read: {error}") from error


def _check_head(head: dict) -> None:
    """Raise a ValueError, KeyError or TypeError where a head says something else than ``Ledger`` writes."""
    run, after = head["run"], head["after"]
    counts = [head["begins"], head["rank"], head["world_size"]]
    lists = [run["data"], run["exclude"], run.get("subset", [None] * len(run["data"]))]
    if not all(type(each) is int and each >= 0 for each in counts) or not 0 < head["world_size"] <= MOST_RANKS:
        raise ValueError(f"its counts are {counts}")
    if not (after is None or is_segment(after)) or not isinstance(run["order"], dict):
        raise ValueError("its head tells no run")
    kinds: list[tuple[type, ...]] = [(str,), (str, type(None)), (int, type(None))]
    for each, kind in zip(lists, kinds, strict=True):
        if len(each) != len(lists[0]) or not all(isinstance(value, kind) and "\0" not in str(value) for value in each):
            raise ValueError("its head tells no data sets")


def is_segment(name: object) -> bool:
    """Tell whether this is a name that a segment has: a number, and behind a point another."""
    return isinstance(name, str) and re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", name) is not None


def read_frame(path: Path, offset: int) -> Frame:
    """Read the frame that begins at an offset of a file.

    Raises:
        BrokenLedgerError: It is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _unpack(*_read(file, offset, os.fstat(file.fileno()).st_size))
    except (OSError, ValueError) as error:
        raise BrokenLedgerError(f"{path} is damaged at byte {offset}: {error}") from error


def _head(file: BinaryIO, offset: int, end: int) -> tuple[int, ...] | None:
    """Return the fields of a frame's head, from its size on; None if there is no whole frame."""
    head = os.pread(file.fileno(), _HEAD.size, offset)
    if len(head) < _HEAD.size:
        return None
    magic, _, *fields = _HEAD.unpack(head)
    return tuple(fields) if magic == _MAGIC and offset + _HEAD.size + fields[0] <= end else None


def _read(file: BinaryIO, offset: int, end: int) -> tuple[tuple[int, ...], bytes]:
    fields = _head(file, offset, end)
    if fields is None:
        raise ValueError("no whole frame there")
    frame = os.pread(file.fileno(), _HEAD.size + fields[0], offset)
    if zlib.crc32(frame[_CHECKED:]) != int.from_bytes(frame[4:_CHECKED], "little"):
        raise ValueError("the checksum is another one")
    return fields[1:], frame[_HEAD.size :]


def _unpack(fields: tuple[int, ...], data: bytes) -> Frame:
    first, step, rows, near, replaced = fields
    types: tuple[np.dtype, ...] = np.dtype(_code_type(near)), np.dtype("u1"), np.dtype("<i8"), np.dtype("<i4")
    counts = rows, rows, near, 3 * replaced
    ends = np.cumsum([0, *(count * type.itemsize for count, type in zip(counts, types, strict=True))]).tolist()
    if ends[-1] > DENSEST * len(data):  # before there is memory for it
        raise ValueError(f"{len(data)} bytes for columns of {ends[-1]}")
    data = pa.decompress(data, decompressed_size=ends[-1], codec="zstd", asbytes=True)
    code, inside, table, marks = map(np.frombuffer, [data] * 4, types, counts, ends[:-1])
    if len(code) and code.max() >= near:
        raise ValueError(f"a sample is near the {code.max()}th place of {near}")
    place = table[code] << _NEAR | inside
    return Frame(first, step, place >> 32, place & 0xFFFFFFFF, marks.reshape(-1, 3))
