"""Checksums of a checkpoint's files: they guard against disks, networks and kills, not against who means to deceive."""

import hashlib
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

CHECKSUMS = {"xxh3_128": xxh3_128, "sha256": hashlib.sha256}
"""By their names in ``checkpoint.json``; up to format 1 it was SHA-256, which took half of a save's processor time."""
WRITTEN = "xxh3_128"


def kind(file: dict[str, Any]) -> str:
    """Return the name of the checksum that an index has of a file; where it has none, of the one that is written."""
    return next((name for name in CHECKSUMS if name in file), WRITTEN)


def begin(name: str = WRITTEN) -> Any:
    """Return the checksum of no bytes yet, which takes more by ``update`` as those of ``hashlib`` do."""
    return CHECKSUMS[name]()


def matches(path: Path, file: dict[str, Any]) -> bool:
    """Tell whether a file has the checksum that an index has of it; raises an OSError if it cannot be read."""
    name = kind(file)
    with open(path, "rb", buffering=0) as opened:
        return hashlib.file_digest(opened, CHECKSUMS[name]).hexdigest() == file[name]
