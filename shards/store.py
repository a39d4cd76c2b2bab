"""Reads and writes the objects of a data set, in a local folder or any store that ``obstore`` knows.

Both kinds offer the same calls and are safe to use from many threads. Local files go through ``os.pread`` on
kept descriptors: 2 µs for a 5 kB sample, against 53 µs through obstore's own local store. What is written
appears whole or not at all.
"""

import fcntl
import io
import os
import random
import re
import shutil
import stat
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

from shards.atomic import fsync_folder, whole_file
from shards.errors import PatchmillError, UserError

# Server errors, lost connections and time-outs are tried again by obstore, with exponential back-off: the time decides,
# since ten tries are over in two seconds.
RETRY = {"max_retries": 1000, "retry_timeout": timedelta(minutes=3)}
OPEN_FILES = 256  # well below the usual limit of 1024 a process
GAP = 1 << 20  # bytes between two ranges that are fetched along rather than asked for apart
STREAM_BYTES = 8 << 20  # a request of a sequential remote read: past the size where latency matters

Answer = TypeVar("Answer")
_ERRORS = (BaseError, OSError, ValueError)  # the last: a path that no store takes


class MissingError(UserError):
    """The object that was asked for is not there."""


class ShortError(UserError):
    """The object ends before the last of the bytes that were asked for."""


class ExistsError(UserError):
    """The object that was to be made is there already."""


class Entry(NamedTuple):
    """An object that a listing found."""

    path: str  # relative to the store
    size: int  # bytes; -1: it cannot be read, as a link to nowhere or a pipe
    changed: int  # nanoseconds since 1970, by the clock of the file system or server


class _Descriptor:
    """A file open for reading, closed when the last thread that reads from it lets go."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class LocalStore:
    """A folder on this machine, or on a file system mounted here."""

    local, web = True, False

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

    def changed(self, path: str) -> int:
        """Return when the object last became what it is: later than ``modified`` for a copy that kept an old time."""
        try:
            status = (self._root / path).stat()
        except OSError as error:
            raise _failure(self.url, path, error) from error
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
            raise _failure(self.url, folder, error) from error
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


class RemoteStore:
    """A bucket prefix or web folder. Credentials come from the environment, in each cloud's own variables."""

    local = False

    def __init__(self, url: str):
        self.url = url
        self.web = url.startswith(("http://", "https://"))  # a plain server: it lists nothing and takes no files
        try:
            options = {"client_options": {"allow_http": True}} if url.startswith("http://") else {}
            self._store = obstore.store.from_url(url, retry_config=RETRY, **options)
        except BaseError as error:
            raise UserError(f"cannot open {url}: {_reason(error)}; check the URL") from error

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return _whole_body(lambda: bytes(obstore.get(self._store, path).bytes()))
        except _ERRORS as error:
            raise _failure(self.url, path, error) from error

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the object from byte ``start``; fewer is an error."""
        return self.read_ranges(path, [start], [length])[0]

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return several ranges of one object, in the order asked; near ones share a request."""
        wanted = [(int(start), int(length)) for start, length in zip(starts, lengths, strict=True)]
        spans = _spans(wanted)
        try:
            # Each span is one request. Obstore would merge ranges itself, and panic where the object ends inside them.
            first, ends = [start for start, _ in spans], [end for _, end in spans]
            parts = _whole_body(lambda: obstore.get_ranges(self._store, path, starts=first, ends=ends, coalesce=0))
        except _ERRORS as error:
            raise _failure(self.url, path, error, spans[0][0], spans[-1][1] - spans[0][0]) from error
        found = []
        for start, length in wanted:
            span = bisect_right(first, start) - 1
            data = bytes(memoryview(parts[span])[start - first[span] : start - first[span] + length])
            if len(data) < length:
                raise _too_short(self.url, path, start, length)
            found.append(data)
        return found

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
        except _ERRORS as error:
            raise _failure(self.url, path, error) from error

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970, by the server's clock."""
        try:
            return int(obstore.head(self._store, path)["last_modified"].timestamp() * 1e9)
        except _ERRORS as error:
            raise _failure(self.url, path, error) from error

    changed = modified  # a server keeps no older time

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """Yield a local file to write; on a clean exit it becomes the object at ``path``, else nothing happened.

        It lies in the system's temporary folder (``TMPDIR``) until it is uploaded. A large file goes up in parts that
        no reader sees before the last one is there; those of a killed process stay, unseen, until the bucket's rules
        remove incomplete uploads.
        """
        with _locked_folder() as folder:
            file = folder / "object"
            yield file
            try:
                obstore.put(self._store, path, file)
            except _ERRORS as error:
                raise PatchmillError(f"cannot write {self.url}/{path}: {_reason(error)}") from error

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object."""
        with self.new_file(path) as partial:
            partial.write_bytes(data)

    def create(self, path: str, data: bytes) -> None:
        """Write a whole object that is not there yet; of two who try at once, one gets the ExistsError."""
        if self.web:
            raise UserError(
                f"cannot write {self.url}/{path}: a plain web server takes no files; copy the data set first"
            )
        try:
            obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError as error:
            raise ExistsError(f"{self.url}/{path} exists, and is never written over") from error
        except _ERRORS as error:
            raise PatchmillError(f"cannot write {self.url}/{path}: {_reason(error)}") from error

    def delete(self, path: str) -> None:
        """Remove the object at ``path`` if it is there."""
        try:
            obstore.delete(self._store, path)
        except (NotFoundError, FileNotFoundError):
            pass
        except _ERRORS as error:
            raise PatchmillError(f"cannot remove {self.url}/{path}: {_reason(error)}") from error

    def folders(self) -> list[str]:
        """Return the sorted names of the folders in the store. Plain web servers cannot list."""
        self._check_lists()
        try:
            return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])
        except _ERRORS as error:
            raise _failure(self.url, "", error) from error

    def list(self, folder: str, below: bool = False) -> list[str]:
        """Return the sorted names of the objects in ``folder``; none if it is missing. Plain web servers cannot list.

        Args:
            folder: Relative to the store.
            below: Those in folders below it too, as ``sub/folder/name``.
        """
        self._check_lists()
        try:
            if below:
                found = [entry for entries in obstore.list(self._store, folder or None) for entry in entries]
            else:
                found = obstore.list_with_delimiter(self._store, folder or None)["objects"]
        except _ERRORS as error:
            raise _failure(self.url, folder, error) from error
        return sorted(entry["path"].removeprefix(f"{folder}/") for entry in found)

    def _check_lists(self) -> None:
        if self.web:
            raise UserError(
                f"plain web servers such as {self.url} cannot list files; name each, as in x-{{000..146}}.tar"
            )

    def walk(self, folder: str = "", hidden: bool = False) -> Iterator[Entry]:
        """Yield all objects below ``folder`` in the order of the server; hidden ones (``.name``) are passed over.

        Args:
            folder: Relative to the store.
            hidden: Yield hidden files too, but nothing in hidden folders.
        """
        self._check_lists()
        try:
            for chunk in obstore.list(self._store, folder or None, chunk_size=1000):
                for found in chunk:
                    folders, _, name = found["path"].rpartition("/")
                    if not any(part.startswith(".") for part in [*folders.split("/"), "" if hidden else name]):
                        yield Entry(found["path"], found["size"], int(found["last_modified"].timestamp() * 1e9))
        except _ERRORS as error:
            raise _failure(self.url, folder, error) from error


@contextmanager
def _locked_folder() -> Iterator[Path]:
    """Yield a temporary folder, after removing those that killed processes left: the lock goes with the process."""
    for old in Path(tempfile.gettempdir()).glob("patchmill-upload-*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - old.stat().st_mtime > 60 and (lock := _lock(old)):
                shutil.rmtree(old)
                os.close(lock)
    with tempfile.TemporaryDirectory(prefix="patchmill-upload-") as folder:
        lock = _lock(Path(folder))
        try:
            yield Path(folder)
        finally:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a locked descriptor of a folder, or None if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


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

    def readall(self) -> bytes:
        pieces = []
        while piece := self.read(STREAM_BYTES):
            pieces.append(piece)
        return b"".join(pieces)


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


def local_path(path: str | Path, name: str) -> Path:
    """Return a path to write to on this machine; ``name`` is what the user calls it.

    Raises:
        UserError: It is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{name} {path}: must be a local path")
    return Path(path)


def _spans(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the sorted (start, end) of the fewest requests that cover the (start, length), near ones merged."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return spans


def _whole_body(request: Callable[[], Answer]) -> Answer:
    """Ask again, with exponential back-off, where a connection ended inside an answer: obstore leaves that to us."""
    for attempt in range(min(RETRY["max_retries"], 10)):
        try:
            return request()
        except BaseError as error:
            if "response body" not in str(error):
                raise
            time.sleep(min(0.1 * 2**attempt, 15) * random.uniform(0.5, 1))  # not all workers at once
    return request()


def _failure(url: str, path: str, error: Exception, start: int | None = None, length: int = 0) -> PatchmillError:
    where = f"{url}/{path}" + (f", bytes {start} to {start + length}" if start is not None else "")
    if isinstance(error, (FileNotFoundError, NotFoundError)):
        return MissingError(f"no object {where}; copy or build the data set again")
    if length and any(sign in str(error) for sign in ("416 Range", "but object was only")):
        return _too_short(url, path, start, length)
    return PatchmillError(f"cannot read {where}: {_reason(error)}")


def _too_short(url: str, path: str, start: int, length: int) -> ShortError:
    return ShortError(
        f"{url}/{path} ends before byte {start + length} (asked for {length} from {start}): "
        "it is cut short or not the file that was indexed; copy, build or index the data set again"
    )


# What obstore says, and what it means to the user.
_HINTS = {
    "builder error": "for a server without TLS set AWS_ALLOW_HTTP=true in the environment",
    "//169.254.169.254/": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, "
    "or AWS_SKIP_SIGNATURE=true for public data",
    "privileges": "check the credentials in the environment",
    "authentication": "check the credentials in the environment",
    "Range request not supported": "use a server that can send parts of a file",
    "list request": "check the bucket",
    "error sending request": "check the network and the address",
}


def _reason(error: Exception) -> str:
    """Return the first line of an error, and a hint; obstore adds pages of its internals below it."""
    text = str(error).strip()
    hints = [hint for sign, hint in _HINTS.items() if sign in text]
    return "; ".join([text.partition("\n")[0].rstrip(": "), *hints[:1]])
