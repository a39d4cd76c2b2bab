"""A bucket, a prefix in it or a web folder as a store, through ``obstore``."""

import io
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotFoundError, NotSupportedError

from shards.arenas import share_arenas
from shards.errors import PatchmillError, UserError
from shards.objects import Entry, ExistsError, MissingError, ShortError, failure, reason, too_short
from shards.remoteaccess import open_remote
from shards.remotefile import remote_file
from shards.retries import Retries
from shards.storesettings import StoreSettings
from shards.temporary import temporary_folder
from shards.wholefiles import WholeFiles

GAP = 1 << 20  # bytes between two ranges that are fetched along rather than asked for apart

ERRORS = (BaseError, OSError, ValueError)  # the last: a path that no store takes


class RemoteStore:
    """A bucket prefix or web folder. Credentials come from the environment, in each cloud's own variables.

    Of a web server that sends no parts of files, whole ones are fetched, and kept until the store is let go.
    """

    local = False

    def __init__(self, url: str, settings: StoreSettings):
        self.url, self.settings = url, settings
        self.web = url.startswith(("http://", "https://"))  # a plain server: it lists nothing and takes no files
        share_arenas()
        self._whole: WholeFiles | None = None
        self._lock = threading.Lock()
        self._retries = Retries(settings.retry_seconds)  # of reads, to count them; obstore tries the rest again
        try:
            self._store, self._reads = open_remote(url, settings), open_remote(url, settings, retry=False)
        except BaseError as error:
            raise UserError(f"cannot open {url}: {reason(error)}; check the URL") from error

    @property
    def retries(self) -> int:
        """Reads that were asked again so far."""
        return self._retries.count

    def read(self, path: str) -> bytes:
        """Return the whole object at ``path``, relative to the store."""
        try:
            return self._retries(lambda: bytes(obstore.get(self._reads, path).bytes()))
        except ERRORS as error:
            raise failure(self.url, path, error) from error

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of the object from byte ``start``; fewer is an error."""
        return self.read_ranges(path, [start], [length])[0]

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return several ranges of one object, in the order asked; near ones share a request."""
        wanted = [(int(start), int(length)) for start, length in zip(starts, lengths, strict=True)]
        if self._whole:
            return self._ranges_of_whole(path, wanted)
        spans = _spans(wanted)
        try:
            # Each span is one request. Obstore would merge ranges itself, and panic where the object ends inside them.
            first, ends = [start for start, _ in spans], [end for _, end in spans]
            parts = self._retries(lambda: self._get_spans(path, first, ends))
        except NotSupportedError:
            self._begin_whole()
            return self._ranges_of_whole(path, wanted)
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

    def forget(self, path: str) -> None:
        """Ask the server anew for an object of which a copy may be here."""
        if self._whole:
            self._whole.forget(path)

    def _get_spans(self, path: str, starts: list[int], ends: list[int]) -> list[obstore.Bytes]:
        parts = obstore.get_ranges(self._reads, path, starts=starts, ends=ends, coalesce=0)
        short = [end for part, start, end in zip(parts, starts, ends, strict=True) if len(part) < end - start]
        if short and max(short) <= obstore.head(self._reads, path)["size"]:  # else the object is cut short
            raise GenericError("the response body is shorter than what was asked for")
        return parts

    def _begin_whole(self) -> None:
        with self._lock:
            if self._whole is None:
                self._whole = WholeFiles(self._fetch)
                print(
                    f"warning: {self.url} sends no parts of files: each shard is fetched whole, by every process, into "
                    f"{self._whole.folder}; a server that knows byte ranges spares that",
                    file=sys.stderr,
                )

    def _ranges_of_whole(self, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        assert self._whole is not None
        found = []
        for start, length in ranges:
            try:
                found.append(self._whole.read_range(path, start, length))
            except ShortError as error:
                raise too_short(self.url, path, start, length) from error
        return found

    def _fetch(self, path: str, target: Path) -> None:
        """Write a whole object to a local file."""

        def download() -> None:
            with open(target, "wb") as file:
                for part in obstore.get(self._reads, path).stream():
                    file.write(part)

        try:
            self._retries(download)
        except ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # of the local disk
                raise UserError(
                    f"no room for {self.url}/{path}: {target.parent}: {error.strerror}; set TMPDIR to another disk, or "
                    "use a server that sends parts of files"
                ) from error
            raise failure(self.url, path, error) from error

    def stream(self, path: str) -> io.BufferedIOBase:
        """Open the object for sequential reading; seeking is allowed."""
        return remote_file(self.size(path), partial(self.read_range, path))

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at ``path``."""
        try:
            self.size(path)
        except MissingError:
            return False
        return True

    def size(self, path: str) -> int:
        """Return the bytes of the object at ``path``."""
        return self._head(path)["size"]

    def modified(self, path: str) -> int:
        """Return when the object at ``path`` was written, nanoseconds since 1970, by the server's clock.

        Servers tell whole seconds: it is the end of that second, since what was made just before is no newer.
        """
        return (int(self._head(path)["last_modified"].timestamp()) + 1) * 10**9 - 1

    def _head(self, path: str) -> Any:
        try:
            return self._retries(lambda: obstore.head(self._reads, path))
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
        with temporary_folder() as folder:
            file = folder / "object"
            yield file
            self.upload(path, file)

    def upload(self, path: str, file: Path) -> None:
        """Write a whole object: what is in a local file."""
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
                found = list(obstore.list_with_delimiter(self._store, folder or None)["objects"])
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


def _spans(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the sorted (start, end) of the fewest requests that cover the (start, length), near ones merged."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if spans and start <= spans[-1][1] + GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return spans
