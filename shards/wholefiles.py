"""Whole objects of servers that send no parts of them, kept in a local folder until the process ends."""

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shards.atomic import whole_file
from shards.localstore import LocalStore
from shards.temporary import temporary_folder


class WholeFiles:
    """Local copies of remote objects, each fetched once when it is first asked for; safe to share between threads.

    Args:
        fetch: Writes the object of a path, its first argument, to a local file, the second.

    Attributes:
        folder: Where the copies are, in the system's temporary folder (``TMPDIR``).
    """

    def __init__(self, fetch: Callable[[str, Path], None]):
        self._fetch = fetch
        stack = ExitStack()
        self.folder = stack.enter_context(temporary_folder())
        weakref.finalize(self, stack.close)  # at the latest when Python ends
        self._copies = LocalStore(self.folder)
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return a range of an object, as ``LocalStore.read_range`` does of its copy."""
        with self._alone(path) as name:
            if not self._copies.exists(name):
                with whole_file(self.folder / name) as partial:
                    self._fetch(path, partial)
            return self._copies.read_range(name, start, length)

    def forget(self, path: str) -> None:
        """Fetch an object anew when it is asked for the next time."""
        with self._alone(path) as name:
            (self.folder / name).unlink(missing_ok=True)
            self._copies = LocalStore(self.folder)  # the one before has the file open

    @contextmanager
    def _alone(self, path: str) -> Iterator[str]:
        """Yield the name of a copy, which nobody else touches meanwhile."""
        name = hashlib.sha256(path.encode()).hexdigest()
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield name
