"""A rank's file of a checkpoint: written piece by piece, read back and flushed."""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import checksum
from pipeline.convert.safetensors import CODES, header_text
from pipeline.engines.fragments import Piece
from shards.atomic import fsync_folder

BLOCK = 2**18
"""Values that are brought to host memory and written at once: 1 MB, which a cache holds from checksum to write."""
BEHIND = 2**24
"""Bytes after which what was written is read back: the system still has it in memory, however little that is."""
ENTRY = 1024
"""Bytes of a header for what is kept of a parameter, beside its names: some 150 of each kind."""


def write_rank_file(path: Path, pieces: Iterable[Piece], names: Iterable[str]) -> dict[str, Any]:
    """Write a rank's pieces, see that the file has what memory had, and flush it.

    Of pieces that are made as they are asked for, one is in host memory at a time, and of those on a GPU one block.

    Args:
        path: Of the file.
        pieces: Float32, on any device.
        names: Of all parameters: the header is before the values, and known after them.

    Returns:
        ``name``, ``bytes`` and checksum, under the checksum's name.

    Raises:
        OSError: It cannot be written, or does not hold what was written.
    """
    room = -(-sum(ENTRY + 8 * len(name) for name in (*names, "optimizer")) // 8) * 8
    header, at, given, found = {}, 0, checksum.begin(), checksum.begin()
    with open(path, "wb+") as file:
        back = file.seek(8 + room)
        for kind, name, start, tensor in pieces:
            offsets, at = [at, at + tensor.nbytes], at + tensor.nbytes
            entry = {"dtype": CODES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": offsets}
            header[f"{kind}/{name}@{start}"] = entry
            for block in tensor.detach().reshape(-1).split(BLOCK):
                values = block.cpu().numpy().data
                given.update(values)
                file.write(values)
                if file.tell() - back >= BEHIND:
                    back = _read_back(file, back, found)
        _read_back(file, back, found)
        text = header_text(header, {})
        if len(text) > room:
            raise OSError(f"the header of {path.name} takes {len(text)} bytes, and {room} were left for it")
        front = struct.pack("<Q", room) + text.ljust(room)
        given.update(front)
        file.seek(0)
        file.write(front)
        _read_back(file, 0, found)
        if found.digest() != given.digest():
            raise OSError(f"{path.name} does not hold what was written to it")
        os.fsync(file.fileno())
    fsync_folder(path.parent)
    return {"name": path.name, "bytes": len(front) + at, checksum.WRITTEN: found.hexdigest()}


def _read_back(file: BinaryIO, start: int, found: Any) -> int:
    """Add to a checksum what a file has from ``start`` to where it stands, and return where that is.

    The system is told to begin to write that, so that the flush at the end waits for little.
    """
    file.flush()
    at, end, buffer = start, file.tell(), memoryview(bytearray(4 * BLOCK))
    while count := os.preadv(file.fileno(), [buffer[: end - at]], at):
        found.update(buffer[:count])
        at += count
    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
    return end
