"""A local cache of remote chunks with a byte limit, shared by all processes and jobs of a machine.

The order of a run is known, so is when each chunk is needed next: that moment is the modification time of the chunk's
file. What is needed last goes first (Belady's rule: the most hits that any cache of that size can have), and a chunk
that is needed later than all that is there is not taken in. So a data set that is larger than the cache gets its
share of hits, where throwing out what was not used for longest would give none.

Moments, and not positions: jobs of different data, order and speed share a cache, and one position has nothing to do
with another's, but what is needed in a minute is worth more than what is needed in an hour, whoever needs it. If jobs
need one chunk, the last one that read it says when it is needed next.

Each chunk is a file of its own with a checksum. There is no index that could be damaged, and nothing is flushed: what a
crash of the machine leaves half-written is found out when it is read. Whoever adds or removes files holds a lock, that
of the file ``MARK``, and counts there the bytes that they take.

What is read is no copy: it is the system's own pages of the file, which it may take back and read again. A file never
changes under its name, and one that is removed stays there for those who read it.
"""

import fcntl
import os
import re
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa

from shards.errors import UserError
from shards.store import local_path

MARK = ".patchmill-cache"  # only folders with this file are written to; it is locked, and holds the bytes in use
CHECKSUM = 4  # bytes at the end of a chunk's file
WRITERS = 8  # threads of a process that write at once
_CHUNK, _PARTIAL = re.compile(r"[0-9a-f]{40}"), re.compile(r"\.[0-9a-f]{40}\.partial")  # nothing else is touched
_PAGE = 4096  # bytes: a disk gives whole ones
_LOOK = 0.01  # of the time, at most, is spent on looking through all files
_PATIENCE = 1.0  # seconds to wait for the lock, which is held for milliseconds unless its process is stopped
_DISK_PATIENCE = 0.1  # seconds to wait for another writer: on a disk slower than the network, not everything is kept


class ChunkCache:
    """Chunks by name in a local folder; safe to use from many threads and processes.

    Jobs that share a folder should have the same limit. A disk that is full or fails is told once, and nothing more is
    written; what is there goes on being used.

    Args:
        folder: Made if it is not there; it must be empty or a cache.
        limit: Bytes that all its chunks take on the disk, at most.

    Attributes:
        hits: Chunks found so far.
        misses: Chunks not found.
        bytes: Of the chunks found.

    Raises:
        UserError: The folder holds something else, or cannot be used.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = local_path(folder, "the cache"), int(limit)
        self.hits = self.misses = self.bytes = 0
        self._counters = threading.Lock()
        self._writers = threading.Semaphore(WRITERS)
        self._writing = True
        self._due: list[tuple[int, str]] = []  # (next use, name) of all chunks at the last look, ascending
        self._next_look = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.listdir(self.folder) and not (self.folder / MARK).exists():
                raise UserError(f"the cache {folder} holds something else; give an empty folder")
            with self._alone(wait=60) as mark:
                self._make_room(mark, 0, -sys.maxsize)  # the limit may be lower than last time
        except OSError as error:
            raise UserError(f"cannot use the cache {folder}: {error.strerror}; give another folder") from error

    def __reduce__(self) -> tuple:
        """Let another process use the same folder."""
        return ChunkCache, (self.folder, self.limit)

    def read(
        self, name: str, lengths: Sequence[int], fetch: Callable[[], list[bytes]], next_use: int
    ) -> list[bytes] | list[memoryview]:
        """Return the parts of a chunk from the cache, else from where ``fetch`` gets them, and keep them.

        Args:
            name: 40 hex digits that stand for these bytes and no others.
            lengths: Bytes of each part.
            fetch: Called if the chunk is not there whole.
            next_use: When it is needed after this, nanoseconds since 1970.
        """
        kept = self.get(name, lengths, next_use)
        if kept is not None:
            return kept
        parts = fetch()
        if self._writers.acquire(timeout=_DISK_PATIENCE):
            try:
                self.put(name, parts, next_use)
            finally:
                self._writers.release()
        return parts

    def get(self, name: str, lengths: Sequence[int], next_use: int) -> list[memoryview] | None:
        """Return the parts of a chunk, or None if it is not there whole; arguments as for ``read``."""
        parts = None
        try:
            with pa.memory_map(str(self.folder / name)) as file:  # unlike mmap's, it keeps no descriptor
                data = memoryview(file.read_buffer()).cast("B")
            ends = list(accumulate(lengths, initial=0))
            found = [data[start:end] for start, end in pairwise(ends)]
            if data[ends[-1] :] == _checksum(name, found):
                parts = found
                with suppress(OSError):  # another user's file
                    os.utime(self.folder / name, ns=(time.time_ns(), next_use))
            damaged = parts is None
        except FileNotFoundError:
            damaged = False
        except OSError:
            damaged = True
        if damaged:
            self._remove(name)
        with self._counters:
            self.hits += parts is not None
            self.misses += parts is None
            self.bytes += sum(map(len, parts or []))
        return parts

    def put(self, name: str, parts: Sequence[bytes], next_use: int) -> None:
        """Keep a chunk if there is room, or chunks that are needed later can make room; arguments as for ``read``."""
        if not self._writing:
            return
        partial = self.folder / f".{name}.partial"
        try:
            with self._alone() as mark:
                if (self.folder / name).exists() or (partial.exists() and not _abandoned(partial)):
                    return  # another process was quicker
                size = sum(map(len, parts)) + CHECKSUM
                if not self._make_room(mark, size, next_use):
                    return
                descriptor = _open_locked(partial, size)
                _count(mark, self._used(mark) + _on_disk(size))
            try:
                with open(descriptor, "wb") as file:
                    file.writelines(parts)
                    file.write(_checksum(name, parts))
                    file.flush()
                    os.utime(partial, ns=(time.time_ns(), next_use))
                    with self._alone():
                        os.replace(partial, self.folder / name)
            except OSError:
                self._remove(partial.name)
                raise
        except BlockingIOError:
            pass  # a process that holds the lock stands still: nobody should wait for it
        except OSError as error:
            with self._counters:
                told, self._writing = not self._writing, False
            if not told:
                print(f"cache {self.folder}: {error.strerror}; going on with what is in it", file=sys.stderr)

    def _remove(self, name: str) -> None:
        with suppress(OSError), self._alone() as mark:
            size = os.stat(self.folder / name).st_size
            os.unlink(self.folder / name)
            _count(mark, self._used(mark) - _on_disk(size))

    def _make_room(self, mark: int, size: int, next_use: int) -> bool:
        """Remove chunks until one of ``size`` bytes fits, as long as they are needed later; tell whether it does."""
        if size > self.limit:
            return False
        used = self._used(mark)
        if used + _on_disk(size) > self.limit and (not self._due or time.monotonic() >= self._next_look):
            used = self._look(mark)
        while used + _on_disk(size) > self.limit and (place := self._goes_next(next_use)) is not None:
            due, name = self._due.pop(place)
            with suppress(FileNotFoundError):  # another process removed it
                status = os.stat(self.folder / name)
                if status.st_mtime_ns == due:  # else it was used since the last look, and is needed at another time
                    os.unlink(self.folder / name)
                    used -= _on_disk(status.st_size)
        _count(mark, used)
        return used + _on_disk(size) <= self.limit

    def _goes_next(self, next_use: int) -> int | None:
        """Return the place in the list of the chunk that goes first for one needed at ``next_use``, if one does.

        Of a run that ended or stands still, the chunks were due long ago: for longer than the last one is ahead. They
        go before all others, and what was due last goes first, since the run may go on.
        """
        if not self._due:
            return None
        now, last = time.time_ns(), self._due[-1][0]
        overdue = bisect_left(self._due, (2 * now - max(last, next_use),))
        return overdue - 1 if overdue else len(self._due) - 1 if last > next_use else None

    def _look(self, mark: int) -> int:
        """List all chunks, remove what crashed processes left half-written, and return and note the bytes in use."""
        began, used, self._due = time.monotonic(), 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _PARTIAL.fullmatch(entry.name) and _abandoned(entry.path):
                    os.unlink(entry.path)
                elif _CHUNK.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name):
                    status = entry.stat(follow_symlinks=False)
                    used += _on_disk(status.st_size)
                    if _CHUNK.fullmatch(entry.name):
                        self._due.append((status.st_mtime_ns, entry.name))
        self._due.sort()
        _count(mark, used)
        now = time.monotonic()
        self._next_look = now + (now - began) / _LOOK
        return used

    def _used(self, mark: int) -> int:
        """Return the bytes in use."""
        text = os.pread(mark, 20, 0)
        return int(text) if text.isdigit() else self._look(mark)

    @contextmanager
    def _alone(self, wait: float = _PATIENCE) -> Iterator[int]:
        """Keep all other threads and processes out; yields a descriptor of the mark."""
        mark = os.open(self.folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.001)
            yield mark
        finally:
            os.close(mark)


def _count(mark: int, used: int) -> None:
    os.pwrite(mark, b"%020d" % used, 0)  # one call over the same bytes: a process that is killed leaves all or nothing


def _on_disk(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _checksum(name: str, parts: Sequence[bytes | memoryview]) -> bytes:
    """Return what follows the parts of a chunk in its file."""
    crc = zlib.crc32(name.encode())  # of the name too: a disk that is repaired may put files in each other's place
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc.to_bytes(CHECKSUM, "little")


def _open_locked(partial: Path, size: int) -> int:
    """Return a descriptor of a new file of zeros that is locked: the lock goes with the process, see ``_abandoned``."""
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        os.unlink(partial)
        raise
    return descriptor


def _abandoned(partial: str | Path) -> bool:
    """Tell whether no process is writing to a file any more; asked only by who keeps the others out."""
    with open(partial, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
