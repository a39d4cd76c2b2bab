"""Temporary folders for what is on its way to a bucket, or comes from a server that sends no parts of files."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a temporary folder, after removing those that killed processes left: the lock goes with the process."""
    for old in Path(tempfile.gettempdir()).glob("patchmill-store-*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - old.stat().st_mtime > 60 and (lock := _lock(old)):
                try:
                    shutil.rmtree(old)
                finally:
                    os.close(lock)
    with tempfile.TemporaryDirectory(prefix="patchmill-store-") as folder:
        lock = _lock(Path(folder))
        try:
            yield Path(folder)
        finally:
            if lock is not None:
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
