"""A local cache of remote chunks with a byte limit, shared by all processes and jobs of a machine.

The order is known, so is each chunk's next use: it is the file's modification time, one nanosecond a position. What is
used last goes first (Belady's rule), and a chunk that is used later than everything in the cache is not taken in. A
chunk is a file of its own; there is no index to be damaged.
"""

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError

MARK = ".patchmill-cache"  # only a folder with this file is ever cleaned; it holds the bytes in use, and is locked
_STALE = 3600  # seconds after which nobody writes to a partial file any more
_SLACK = 0.05  # of the limit, freed beyond need, so that not every chunk has to look for room


class ChunkCache:
    """Chunks by name in a local folder; safe to use from many threads and processes.

    Args:
        folder: Made if it is not there; it must be empty or a cache.
        limit: Bytes of all chunks in it, at most.

    Attributes:
        hits: Chunks found so far.
        misses: Chunks not found.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder), int(limit)
        self.hits = self.misses = 0
        self._full = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MARK).exists():
                if any(self.folder.iterdir()):
                    raise UserError(f"cache {folder} holds something else; give an empty folder")
                (self.folder / MARK).touch()
        except OSError as error:
            raise UserError(f"cannot use the cache {folder}: {error.strerror}; give another folder") from error
        with self._alone() as count:
            self._clean()
            count(sum(size for _, size, _ in self._entries()))

    def get(self, name: str, length: int) -> bytes | None:
        """Return a chunk of ``length`` bytes, or None if it is not there whole."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            data = None
        if data is not None and len(data) != length:  # the machine went down while it was written
            (self.folder / name).unlink(missing_ok=True)
            data = None
        self.hits += data is not None
        self.misses += data is None
        return data

    def put(self, name: str, data: bytes, next_use: int) -> None:
        """Keep a chunk for position ``next_use``, if there is room or a chunk that is used later.

        A disk that is full is told once, and nothing more is written.
        """
        if self._full or (self.folder / name).exists():
            return
        partial = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}.partial"
        try:
            if not self._reserve(len(data), next_use):
                return
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.utime(partial, ns=(time.time_ns(), next_use))
            os.replace(partial, self.folder / name)
        except OSError as error:
            self._full = True
            print(f"cache {self.folder}: {error.strerror}; going on without writing to it", file=sys.stderr)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
                with self._alone() as count:
                    count(count() - len(data))

    def later(self, name: str, next_use: int) -> None:
        """Note the next use of a chunk that was read from the cache."""
        with contextlib.suppress(FileNotFoundError):  # another process made room
            os.utime(self.folder / name, ns=(time.time_ns(), next_use))

    def _reserve(self, length: int, next_use: int) -> bool:
        """Count ``length`` bytes as used, if need be after removing chunks used later; tell whether they fit."""
        with self._alone() as count:
            used = count()
            if used + length > self.limit:
                entries = sorted(self._entries(), reverse=True)
                used = sum(size for _, size, _ in entries)
                for use, size, path in entries:
                    if use <= next_use or used + length <= self.limit * (1 - _SLACK):
                        break
                    path.unlink(missing_ok=True)
                    used -= size
            fits = used + length <= self.limit
            count(used + length if fits else used)
            return fits

    def _clean(self) -> None:
        """Remove what crashed processes left half-written."""
        for path in self.folder.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (next use, bytes, path) of each chunk."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    yield status.st_mtime_ns, status.st_size, Path(entry.path)

    @contextmanager
    def _alone(self) -> Iterator[Callable[..., int]]:
        """Keep all other processes out; yields what returns, or sets and returns, the bytes in use."""
        with open(self.folder / MARK, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)

            def count(used: int | None = None) -> int:
                if used is None:
                    file.seek(0)
                    return int(file.read() or 0)
                file.seek(0)
                file.truncate()
                file.write(str(used))
                file.flush()
                return used

            yield count
