"""A bucket, a prefix in it or a web folder as a store, through ``obstore``."""

import io
import itertools
import os
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

from shards.errors import PatchmillError, UserError
from shards.objects import Entry, ExistsError, MissingError, failure, reason, too_short
from shards.storesettings import StoreSettings
from shards.uploads import upload_folder

GAP = 1 << 20  # bytes between two ranges that are fetched along rather than asked for apart
STREAM_BYTES = 8 << 20  # a request of a sequential remote read: past the size where latency matters

Answer = TypeVar("Answer")
ERRORS = (BaseError, OSError, ValueError)  # the last: a path that no store takes


class RemoteStore:
    """A bucket prefix or web folder. Credentials come from the environment, in each cloud's own variables."""

    local = False

    def __init__(self, url: str, settings: StoreSettings):
        self.url, self.settings = url, settings
        self.web = url.startswith(("http://", "https://"))  # a plain server: it lists nothing and takes no files
        try:
            options = {"client_options": {"allow_http": True}} if url.startswith("http://") else {}
            # Server errors, lost connections and time-outs are tried again by obstore, with exponential back-off: the
            # time decides, since ten tries are over in two seconds.
            retry = {"max_retries": 1000, "retry_timeout": timedelta(seconds=settings.retry_seconds)}
            self._store = obstore.store.from_url(url, retry_config=retry, **options)
        except BaseError as error:
            raise UserError(f"cannot open {url}: {reason(error)}; check the URL") from error

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return self._whole_body(lambda: bytes(obstore.get(self._store, path).bytes()))
        except ERRORS as error:
            raise failure(self.url, path, error) from error

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
            parts = self._whole_body(lambda: obstore.get_ranges(self._store, path, starts=first, ends=ends, coalesce=0))
        except ERRORS as error:
            raise failure(self.url, path, error, spans[0][0], spans[-1][1] - spans[0][0]) from error
        found = []
        for start, length in wanted:
            span = bisect_right(first, start) - 1
            data = bytes(memoryview(parts[span])[start - first[span] : start - first[span] + length])
            if len(data) < length:
                raise too_short(self.url, path, start, length)
            found.append(data)
        return found

    def _whole_body(self, request: Callable[[], Answer]) -> Answer:
        """Ask again, with back-off, where a connection ended inside an answer: obstore leaves that to us."""
        deadline = time.monotonic() + self.settings.retry_seconds
        for attempt in itertools.count():
            try:
                return request()
            except BaseError as error:
                wait = min(0.1 * 2**attempt, 15) * random.uniform(0.5, 1)  # not all workers at once
                if "response body" not in str(error) or time.monotonic() + wait > deadline:
                    raise
                time.sleep(wait)

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
        except ERRORS as error:
            raise failure(self.url, path, error) from error

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970, by the server's clock.

        Servers tell whole seconds: it is the end of that second, since what was made just before is no newer.
        """
        try:
            return (int(obstore.head(self._store, path)["last_modified"].timestamp()) + 1) * 10**9 - 1
        except ERRORS as error:
            raise failure(self.url, path, error) from error

    changed = modified  # a server keeps no older time

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        """Yield a local file to write; on a clean exit it becomes the object at ``path``, else nothing happened.

        It lies in the system's temporary folder (``TMPDIR``) until it is uploaded. A large file goes up in parts that
        no reader sees before the last one is there; those of a killed process stay, unseen, until the bucket's rules
        remove incomplete uploads.
        """
        with upload_folder() as folder:
            file = folder / "object"
            yield file
            try:
                obstore.put(self._store, path, file)
            except ERRORS as error:
                raise PatchmillError(f"cannot write {self.url}/{path}: {reason(error)}") from error

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
        except ERRORS as error:
            raise PatchmillError(f"cannot write {self.url}/{path}: {reason(error)}") from error

    def delete(self, path: str) -> None:
        """Remove the object at ``path`` if it is there."""
        try:
            obstore.delete(self._store, path)
        except (NotFoundError, FileNotFoundError):
            pass
        except ERRORS as error:
            raise PatchmillError(f"cannot remove {self.url}/{path}: {reason(error)}") from error

    def folders(self) -> list[str]:
        """Return the sorted names of the folders in the store. Plain web servers cannot list."""
        self._check_lists()
        try:
            return sorted(obstore.list_with_delimiter(self._store)["common_prefixes"])
        except ERRORS as error:
            raise failure(self.url, "", error) from error

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
        except ERRORS as error:
            raise failure(self.url, folder, error) from error
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
        except ERRORS as error:
            raise failure(self.url, folder, error) from error


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


def _spans(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the sorted (start, end) of the fewest requests that cover the (start, length), near ones merged."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return spans
