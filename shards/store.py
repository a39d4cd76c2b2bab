"""Reads and writes the objects of a data set, in a local folder or any store that ``obstore`` knows.

Both kinds offer the same calls and are safe to use from many threads. Local files go through ``os.pread`` on
kept descriptors: 2 µs for a 5 kB sample, against 53 µs through obstore's own local store. What is written
appears whole or not at all.
"""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError

from shards.atomic import whole_file
from shards.errors import PatchmillError, UserError

# Server errors, lost connections and time-outs are tried again by obstore, with exponential back-off.
RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
OPEN_FILES = 256  # well below the usual limit of 1024 a process
STREAM_BYTES = 8 << 20  # a request of a sequential remote read: past the size where latency matters


class MissingError(UserError):
    """The object that was asked for is not there."""


class _Descriptor:
    """A file open for reading, closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class LocalStore:
    """A folder on this machine, or on a file system mounted here."""

    local = True

    def __init__(self, root: Path):
        self.url = str(root)
        self._root = root
        self._open = lru_cache(maxsize=OPEN_FILES)(_Descriptor)

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return (self._root / path).read_bytes()
        except OSError as error:
            raise _failure(self.url, path, error) from error

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the object from byte ``start``; fewer is an error."""
        try:
            file = self._open(self._root / path)
            data = os.pread(file.number, length, start)
            while len(data) < length:  # one call returns at most 2 GiB, and less on some network file systems
                more = os.pread(file.number, length - len(data), start + len(data))
                if not more:
                    raise _too_short(self.url, path, start, length)
                data += more
        except OSError as error:
            raise _failure(self.url, path, error, start, length) from error
        return data

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return several ranges of one object, in the order asked."""
        return [self.read_range(path, start, length) for start, length in zip(starts, lengths, strict=True)]

    def folders(self) -> list[str]:
        """Return the sorted names of the folders in the store."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())

    def stream(self, path: str) -> io.BufferedIOBase:
        """Open the object for sequential reading; seeking is allowed."""
        try:
            return open(self._root / path, "rb")
        except OSError as error:
            raise _failure(self.url, path, error) from error

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at ``path``."""
        return (self._root / path).is_file()

    def size(self, path: str) -> int:
        """Return the bytes of the object at ``path``."""
        try:
            return (self._root / path).stat().st_size
        except OSError as error:
            raise _failure(self.url, path, error) from error

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970."""
        try:
            return (self._root / path).stat().st_mtime_ns
        except OSError as error:
            raise _failure(self.url, path, error) from error

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """Yield a local file to write; on a clean exit it becomes the object at ``path``, else nothing happened."""
        with whole_file(self._root / path) as partial:
            yield partial

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object."""
        with self.new_file(path) as partial:
            partial.write_bytes(data)

    def delete(self, path: str) -> None:
        """Remove the object at ``path`` if it is there."""
        (self._root / path).unlink(missing_ok=True)

    def list(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in ``folder``; none if it is missing."""
        here = self._root / folder
        return sorted(file.name for file in here.iterdir() if file.is_file()) if here.is_dir() else []


class RemoteStore:
    """A bucket prefix or web folder. Credentials come from the environment, in each cloud's own variables."""

    local = False

    def __init__(self, url: str):
        self.url = url
        try:
            self._store = obstore.store.from_url(
                url, client_options={"allow_http": url.startswith("http://")}, retry_config=RETRY
            )
        except BaseError as error:
            raise UserError(f"cannot open {url}: {_reason(error)}; check the URL") from error

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except (BaseError, OSError) as error:
            raise _failure(self.url, path, error) from error

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the object from byte ``start``; fewer is an error."""
        return self.read_ranges(path, [start], [length])[0]

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return several ranges of one object, in the order asked; near ones share a request."""
        starts, lengths = [int(start) for start in starts], [int(length) for length in lengths]
        try:
            parts = obstore.get_ranges(self._store, path, starts=starts, lengths=lengths)
        except (BaseError, OSError) as error:
            first, last = min(starts), max(map(sum, zip(starts, lengths, strict=True)))
            raise _failure(self.url, path, error, first, last - first) from error
        for part, start, length in zip(parts, starts, lengths, strict=True):
            if len(part) < length:
                raise _too_short(self.url, path, start, length)
        return [bytes(part) for part in parts]

    def stream(self, path: str) -> io.BufferedIOBase:
        """Open the object for sequential reading; seeking is allowed."""
        return io.BufferedReader(_RemoteFile(self, path), STREAM_BYTES)

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at ``path``."""
        try:
            self.size(path)
        except MissingError:
            return False
        return True

    def size(self, path: str) -> int:
        """Return the bytes of the object at ``path``."""
        try:
            return obstore.head(self._store, path)["size"]
        except (BaseError, OSError) as error:
            raise _failure(self.url, path, error) from error

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970, by the server's clock."""
        try:
            return int(obstore.head(self._store, path)["last_modified"].timestamp() * 1e9)
        except (BaseError, OSError) as error:
            raise _failure(self.url, path, error) from error

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """Yield a local file to write; on a clean exit it becomes the object at ``path``, else nothing happened.

        It lies in the system's temporary folder (``TMPDIR``) until it is uploaded.
        """
        with tempfile.TemporaryDirectory(prefix="patchmill-") as folder:
            file = Path(folder) / "object"
            yield file
            try:
                obstore.put(self._store, path, file)
            except (BaseError, OSError) as error:
                raise PatchmillError(f"cannot write {self.url}/{path}: {_reason(error)}") from error

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object."""
        with self.new_file(path) as partial:
            partial.write_bytes(data)

    def delete(self, path: str) -> None:
        """Remove the object at ``path`` if it is there."""
        try:
            obstore.delete(self._store, path)
        except (NotFoundError, FileNotFoundError):
            pass
        except (BaseError, OSError) as error:
            raise PatchmillError(f"cannot remove {self.url}/{path}: {_reason(error)}") from error

    def folders(self) -> list[str]:
        """Return the sorted names of the folders in the store. Plain web servers cannot list."""
        try:
            return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])
        except (BaseError, OSError) as error:
            raise _failure(self.url, "", error) from error

    def list(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in ``folder``. Plain web servers cannot list."""
        try:
            objects = obstore.list_with_delimiter(self._store, folder)["objects"]
        except (BaseError, OSError) as error:
            raise _failure(self.url, folder, error) from error
        return sorted(entry["path"].rpartition("/")[2] for entry in objects)


class _RemoteFile(io.RawIOBase):
    """A remote object as a file: each read is one range request, so wrap it in a large buffer."""

    def __init__(self, store: RemoteStore, path: str):
        self._store, self._path = store, path
        self._size, self._at = store.size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._store.read_range(self._path, self._at, length)
            self._at += length
        return length


Store = LocalStore | RemoteStore


def open_store(url: str | Path, create: bool = False) -> Store:
    """Open a local path or a ``file://``, ``http(s)://``, ``s3://``, ``gs://`` or ``az://`` URL.

    Args:
        url: Of a folder, a bucket or a prefix in it.
        create: Make a local folder that is missing.

    Raises:
        UserError: The local folder is missing, the URL is of no known kind, or it carries a password.
    """
    parts = urlsplit(str(url))
    if "://" in str(url) and parts.scheme != "file":
        if parts.password:
            raise UserError(f"the URL of {parts.hostname} carries a password; put secrets into the environment instead")
        return RemoteStore(str(url).rstrip("/"))
    root = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)
    if create:
        root.mkdir(parents=True, exist_ok=True)
    if not root.is_dir():
        raise MissingError(f"no folder {root}; check the path")
    return LocalStore(root)


def _failure(url: str, path: str, error: Exception, start: int | None = None, length: int = 0) -> PatchmillError:
    where = f"{url}/{path}" + (f", bytes {start} to {start + length}" if start is not None else "")
    if isinstance(error, (FileNotFoundError, NotFoundError)):
        return MissingError(f"no object {where}; copy or build the data set again")
    return PatchmillError(f"cannot read {where}: {_reason(error)}")


def _too_short(url: str, path: str, start: int, length: int) -> PatchmillError:
    return PatchmillError(
        f"{url}/{path} ends before byte {start + length} (asked for {length} from {start}): "
        "it is cut short or not the file that was indexed; copy or build the data set again"
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error; obstore adds pages of its internals below it."""
    return str(error).strip().partition("\n")[0]
