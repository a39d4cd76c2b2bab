"""A folder as a store. Files are read with ``os.pread`` on kept descriptors.

That takes 2 µs for a 5 kB sample, against 53 µs through obstore's own local store.
"""

import io
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from shards.atomic import fsync_folder, whole_file
from shards.errors import PatchmillError, UserError
from shards.objects import Entry, ExistsError, failure, too_short

OPEN_FILES = 256  # well below the usual limit of 1024 a process


class _Descriptor:
    """A file open for reading, closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class LocalStore:
    """A folder on this machine, or on a file system mounted here."""

    local, web, retries = True, False, 0

    def __init__(self, root: Path):
        self.url = str(root)
        self._root = root
        self._open = lru_cache(maxsize=OPEN_FILES)(lambda path: _Descriptor(root / path))

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return (self._root / path).read_bytes()
        except OSError as error:
            raise failure(self.url, path, error) from error

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the object from byte ``start``; fewer is an error."""
        try:
            file = self._open(path)
            data = os.pread(file.number, length, start)
            while len(data) < length:  # one call returns at most 2 GiB, and less on some network file systems
                more = os.pread(file.number, length - len(data), start + len(data))
                if not more:
                    raise too_short(self.url, path, start, length)
                data += more
        except OSError as error:
            raise failure(self.url, path, error, start, length) from error
        return data

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return several ranges of one object, in the order asked."""
        return [self.read_range(path, start, length) for start, length in zip(starts, lengths, strict=True)]

    def forget(self, path: str) -> None:
        """Do nothing: no copy of an object is kept, as a remote store may."""

    def folders(self) -> list[str]:
        """Return the sorted names of the folders in the store."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())

    def stream(self, path: str) -> io.BufferedIOBase:
        """Open the object for sequential reading; seeking is allowed."""
        try:
            return open(self._root / path, "rb")
        except OSError as error:
            raise failure(self.url, path, error) from error

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at ``path``."""
        return (self._root / path).is_file()

    def size(self, path: str) -> int:
        """Return the bytes of the object at ``path``."""
        try:
            return (self._root / path).stat().st_size
        except OSError as error:
            raise failure(self.url, path, error) from error

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970."""
        try:
            return (self._root / path).stat().st_mtime_ns
        except OSError as error:
            raise failure(self.url, path, error) from error

    def changed(self, path: str) -> int:
        """Return when the object last became what it is: later than ``modified`` for a copy that kept an old time."""
        try:
            status = (self._root / path).stat()
        except OSError as error:
            raise failure(self.url, path, error) from error
        return max(status.st_mtime_ns, status.st_ctime_ns)

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """Yield a local file to write; on a clean exit it becomes the object at ``path``, else nothing happened."""
        with whole_file(self._root / path) as partial:
            yield partial

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object."""
        with self.new_file(path) as partial:
            partial.write_bytes(data)

    def upload(self, path: str, file: Path) -> None:
        """Write a whole object: what is in a local file."""
        try:
            with self.new_file(path) as partial:
                shutil.copyfile(file, partial)
        except OSError as error:
            raise PatchmillError(f"cannot write {self.url}/{path}: {error.strerror}") from error

    def create(self, path: str, data: bytes) -> None:
        """Write a whole object that is not there yet; of two who try at once, one gets the ExistsError."""
        target = self._root / path
        partial = target.parent / f".{target.name}.{uuid4().hex}.partial"  # of this try alone
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(partial, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(partial, target)  # a rename would write over
            finally:
                partial.unlink(missing_ok=True)
            fsync_folder(target.parent)
        except OSError as error:
            if target.exists():
                raise ExistsError(f"{self.url}/{path} exists, and is never written over") from error
            raise UserError(f"cannot write {self.url}/{path}: {error.strerror}; mend that and try again") from error

    def delete(self, path: str) -> None:
        """Remove the object at ``path`` if it is there."""
        (self._root / path).unlink(missing_ok=True)

    def list(self, folder: str, below: bool = False) -> list[str]:
        """Return the sorted names of the objects in ``folder``; none if it is missing.

        Args:
            folder: Relative to the store.
            below: Those in folders below it too, as ``sub/folder/name``.
        """
        here = self._root / folder
        found = here.rglob("*") if below else here.glob("*")
        return sorted(path.relative_to(here).as_posix() for path in found if path.is_file())

    def walk(self, folder: str = "", hidden: bool = False) -> Iterator[Entry]:
        """Yield all objects below ``folder``, sorted folder by folder; hidden ones (``.name``) are passed over.

        Args:
            folder: Relative to the store.
            hidden: Yield hidden files too, but nothing in hidden folders.
        """
        try:
            with os.scandir(self._root / folder) as entries:
                found = sorted(
                    (each for each in entries if hidden or not each.name.startswith(".")), key=lambda each: each.name
                )
        except OSError as error:
            raise failure(self.url, folder, error) from error
        for entry in found:
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link that leads to itself
                raise UserError(f"cannot read {self.url}/{path}: {error.strerror}; mend or remove it") from error
            if is_folder:
                if not entry.name.startswith("."):
                    yield from self.walk(path, hidden)
                continue
            try:
                status = entry.stat()
            except OSError:
                yield Entry(path, -1, 0)
            else:  # a pipe or socket could be waited for for ever
                yield Entry(path, status.st_size if stat.S_ISREG(status.st_mode) else -1, status.st_ctime_ns)
