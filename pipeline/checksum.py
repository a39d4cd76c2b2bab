"""Checksums of a checkpoint's files: they guard against disks, networks and kills, not against who means to deceive."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

CHECKSUMS: dict[str, Callable[[], Any]] = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}
"""By their names in ``checkpoint.json``; up to format 1 it was SHA-256, which took half of a save's processor time."""
WRITTEN = "xxh3_128"


def kind(file: dict[str, Any]) -> str:
    """Return the name of the checksum that an index has of a file; where it has none, of the one that is written."""
    return next((name for name in CHECKSUMS if name in file), WRITTEN)


def begin() -> Any:
    """Return the checksum of no bytes yet, which takes more by ``update`` as those of ``hashlib`` do."""
    return CHECKSUMS[WRITTEN]()


def matches(path: Path, file: dict[str, Any]) -> bool:
    """Tell whether a file has the checksum that an index has of it; raises an OSError if it cannot be read.

    It is of the values, and then of the header before them, which is known last. SHA-256 was of the file as it lies.
    """
    name, front = kind(file), b""
    with open(path, "rb", buffering=0) as opened:
        if name == WRITTEN:
            front = opened.read(8)
            front += opened.read(min(int.from_bytes(front, "little"), file["bytes"]))
        found = hashlib.file_digest(opened, CHECKSUMS[name])  # from there on
    found.update(front)
    return found.hexdigest() == file[name]
