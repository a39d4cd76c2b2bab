"""Puts images that cannot be read in place where they can: once, whole or not at all, by whoever comes first.

For each file of a source there is ``NAME.bin``, bytes one after the other, and ``NAME.parquet``, what is known of them,
which is written last. Both are kept as long as the file of the source is the same.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from shards.atomic import fsync_folder
from shards.objects import Entry
from shards.sources import clean_key
from shards.store import Store

NAME_BYTES = 100  # of a file's name: with what is put before and behind it, it must stay below 255


def unpack(
    folder: Path, name: str, source: Entry, make: Callable[[BinaryIO], pa.Table], wait: bool = True
) -> pa.Table | None:
    """Return what ``make`` returned when it wrote ``NAME.bin``, now or in an earlier try.

    Args:
        folder: Made if it is not there; several processes, also on several machines, may unpack into it at once.
        name: Relative to the folder, may have folders itself.
        source: The file that is unpacked: another size or time of change, and it is unpacked again.
        make: Writes all bytes to a file and returns a table of any columns. The same source must give the same bytes.
        wait: Otherwise return None at once if somebody else is unpacking this file.
    """
    data, known = folder / f"{name}.bin", folder / f"{name}.parquet"
    stamp = {"source": json.dumps([source.size, source.changed])}
    data.parent.mkdir(parents=True, exist_ok=True)
    with _alone(data, wait) as (mine, locked):
        if not mine:
            return None
        rows = _finished(data, known, stamp)
        if rows is not None:
            return rows
        known.unlink(missing_ok=True)  # from here on it must not vouch for other bytes
        if locked:  # nobody else is writing: what lies here was left by the killed
            for left in data.parent.glob(f".{data.stem}.*.partial"):
                left.unlink(missing_ok=True)
        with _whole(data) as file:
            rows = make(file)
        noted = {name.decode(): value.decode() for name, value in (rows.schema.metadata or {}).items()}
        rows = rows.replace_schema_metadata(noted | stamp | {"bytes": str(data.stat().st_size)})
        with _whole(known) as file:
            pq.write_table(rows, file)
        fsync_folder(data.parent)
        return rows


def harmless(path: str) -> str:
    """Return a name to unpack a file of the source under: nowhere else, and of this file alone."""
    parts = [part.encode()[:NAME_BYTES].decode(errors="ignore") for part in clean_key(path).split("/")]
    return f"{'/'.join(parts)}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"


def look(store: Store, path: str) -> Entry:
    """Return size and time of change of one object."""
    if store.local:
        size = store.size(path)  # with its error if there is none
        return Entry(path, size, os.stat(os.path.join(store.url, path)).st_ctime_ns)
    return Entry(path, store.size(path), store.modified(path))


def _finished(data: Path, known: Path, stamp: dict[str, str]) -> pa.Table | None:
    try:
        rows = pq.read_table(known)
        size = data.stat().st_size
    except (OSError, pa.ArrowException):  # missing or damaged
        return None
    metadata = {name.decode(): value.decode() for name, value in rows.schema.metadata.items()}
    return rows if (stamp | {"bytes": str(size)}).items() <= metadata.items() else None


@contextmanager
def _alone(path: Path, wait: bool) -> Iterator[tuple[bool, bool]]:
    """Keep others out of one file; yield whether it is ours to write, and whether the file system has locks at all.

    Where it has none two may write the same at once: each under its own name, and the last to rename wins.
    """
    descriptor = os.open(path.parent / f".{path.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine, locked = True, True
        except BlockingIOError:
            mine, locked = False, True
        except OSError:
            mine, locked = True, False
        yield mine, locked
    finally:
        os.close(descriptor)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    partial = path.parent / f".{path.stem}.{uuid4().hex}.partial"
    try:
        with open(partial, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
