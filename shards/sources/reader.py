"""Reads the bytes of a source's items, wherever they are, in order."""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from shards.errors import PatchmillError, UserError
from shards.header import BrokenImageError
from shards.objects import MissingError
from shards.remotestore import RemoteStore
from shards.sources import Item, unpacked_path, web
from shards.store import Store, open_store
from shards.storesettings import StoreSettings
from shards.urls import parts_of, refuse_secrets

AHEAD = 32  # remote reads in flight: enough to hide a round trip of 100 ms behind 300 images a second
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@lru_cache(maxsize=256)  # one a bucket or host, so that connections are kept
def _store(url: str, page: bool = False) -> Store:
    if not page:
        return open_store(url)
    refuse_secrets(url.partition("?")[0])  # a query is a part of the name of a page
    return RemoteStore(url.rstrip("/"), StoreSettings())


@dataclass(frozen=True)
class Reader:
    """Reads items of one source; may be sent to other processes.

    Attributes:
        root: Folder or URL that relative files count from.
        unpacked: Local folder that files ``@/...`` count from.
    """

    root: str
    unpacked: Path

    def read(self, item: Item) -> bytes:
        """Return the bytes of one image.

        Raises:
            BrokenImageError: It is not to be had, and nobody had seen it: it is remote, or its size was unknown. Or its
                source says that it is broken. The message is the reason: missing, or what source or server say.
            UserError: A local file is gone, unreadable, or no longer as long as the item says.
            PatchmillError: The network failed, in spite of retries.
        """
        if item.broken:
            raise BrokenImageError(item.broken)
        try:
            store, path = self._place(item.file)
        except (PatchmillError, ValueError) as error:
            if not _URL.match(item.file):
                raise
            raise BrokenImageError(f"no URL that can be opened: {error}") from error
        whole = item.size < 0 or (item.offset == 0 and not item.file.startswith("@/"))
        if item.size == 0 and not whole:
            return b""
        if store.local and item.size < 0 and not os.path.isfile(os.path.join(store.url, path)):
            raise BrokenImageError("missing")
        if not store.local and path and _odd(path):
            raise BrokenImageError("missing")  # the store could have no such name
        page = item.size < 0 and store.url.startswith(("http://", "https://"))
        if page and web.is_unknown(urlsplit(store.url).hostname):
            raise BrokenImageError("unknown host")
        try:
            data = store.read(path) if whole else store.read_range(path, item.offset, item.size)
        except MissingError as error:
            if store.local:
                raise UserError(f"cannot read {item.file} of {self.root}: {_reason(error)}") from error
            raise BrokenImageError("missing") from error
        except PatchmillError as error:
            if store.local:
                raise UserError(f"cannot read {item.file} of {self.root}: {_reason(error)}") from error
            if not page:
                raise
            return _ask_again(f"{store.url}/{quote(path)}" if path else store.url, error)
        if whole and 0 <= item.size != len(data):
            raise UserError(
                f"{item.file} of {self.root} changed while the build ran ({item.size} bytes, now {len(data)}); build "
                "again when the source is at rest"
            )
        return data

    def read_all(self, items: Iterable[Item]) -> Iterator[tuple[Item, bytes | BrokenImageError]]:
        """Yield items in order, each with its bytes, or with the error that says why it is not to be had.

        Remote images are read ahead by threads; local ones are read when their turn comes.

        Raises:
            UserError, PatchmillError: As from ``read``.
        """
        waiting: deque[tuple[Item, Future | None]] = deque()
        requests = StoreSettings().concurrency or AHEAD
        pool = ThreadPoolExecutor(requests)
        try:
            for item in items:
                waiting.append((item, None if self._local(item.file) else pool.submit(self._try, item)))
                while waiting and (waiting[0][1] is None or len(waiting) > requests):
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _next(self, waiting: deque[tuple[Item, Future | None]]) -> tuple[Item, bytes | BrokenImageError]:
        item, future = waiting.popleft()
        return item, future.result() if future else self._try(item)

    def _try(self, item: Item) -> bytes | BrokenImageError:
        try:
            return self.read(item)
        except BrokenImageError as error:
            return error

    def _local(self, file: str) -> bool:
        if _URL.match(file):
            return file.lower().startswith("file://")
        return file.startswith(("/", "@/")) or _store(self.root).local

    def _place(self, file: str) -> tuple[Store, str]:
        """Return the store that holds a file, and its path there."""
        if file.startswith("@/"):
            return _store("/"), str(unpacked_path(self.unpacked.absolute(), file))
        if file.startswith("/"):
            return _store("/"), file
        if not _URL.match(file):
            return _store(self.root), file.removeprefix("./")
        parts = parts_of(file)
        if parts.scheme == "file":
            return _store("/"), unquote(parts.path)
        if parts.scheme not in ("http", "https"):  # a bucket: the rest is a key, in which nothing is quoted
            bucket, _, key = file.partition("://")[2].partition("/")
            return _store(f"{parts.scheme}://{bucket}"), key
        path = unquote(parts.path.lstrip("/"))
        if parts.query or "%2F" in parts.path.upper() or _odd(path):  # no path of a store: only the URL names it
            return _store(file, page=True), ""
        return _store(f"{parts.scheme}://{parts.netloc}"), path


def _ask_again(url: str, error: PatchmillError) -> bytes:
    """Return a page that could not be read, if it can be had in another way, or raise why it cannot."""
    if web.lacks_length(error.__cause__):
        return web.fetch(url)
    reason = web.refusal(error.__cause__)
    if reason:
        raise BrokenImageError(reason) from error
    raise error


def _odd(path: str) -> bool:
    return any(part in ("", ".", "..") for part in path.split("/"))


def _reason(error: PatchmillError) -> str:
    why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
    return f"{why}; mend or remove it, then build again"
