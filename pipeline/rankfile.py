"""A rank's file of a checkpoint: written piece by piece, flushed and read back."""

import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import checksum
from pipeline.convert.safetensors import CODES, header_text
from pipeline.engines.fragments import Piece
from shards.atomic import fsync_folder

BLOCK = 2**18
"""Values that are brought to host memory and written at once: 1 MB, which a cache holds from checksum to write."""
SEND = 2**25
"""Bytes after which the system is told to begin to write: the flush at the end then waits for little."""
ENTRY = 1024
"""Bytes of a header for what is kept of a parameter, beside its names: some 150 of each kind."""


def write_rank_file(path: Path, pieces: Iterable[Piece], names: Iterable[str]) -> dict[str, Any]:
    """Write a rank's pieces, flush them, and see that the file has what memory had.

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
    header, at, sent, given = {}, 0, 0, checksum.begin()
    with open(path, "wb") as file:
        file.seek(8 + room)
        for kind, name, start, tensor in pieces:
            offsets, at = [at, at + tensor.nbytes], at + tensor.nbytes
            entry = {"dtype": CODES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": offsets}
            header[f"{kind}/{name}@{start}"] = entry
            for block in tensor.detach().reshape(-1).split(BLOCK):
                values = block.cpu().numpy().data
                given.update(values)
                file.write(values)
            if file.tell() - sent > SEND:
                sent = _send(file, sent)
        text = header_text(header, {})
        if len(text) > room:
            raise OSError(f"the header of {path.name} takes {len(text)} bytes, and {room} were left for it")
        front = struct.pack("<Q", room) + text.ljust(room)
        file.seek(0)
        file.write(front)
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as beside:
        flushed = beside.submit(_flush, path)
        found = _read_back(path, front, given.digest())
        flushed.result()
    return {"name": path.name, "bytes": len(front) + at, checksum.WRITTEN: found}


def _send(file: BinaryIO, sent: int) -> int:
    """Let the system begin to write what was given to ``file`` from byte ``sent`` on; return how far that is."""
    file.flush()
    os.posix_fadvise(file.fileno(), sent, file.tell() - sent, os.POSIX_FADV_DONTNEED)
    return file.tell()


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _read_back(path: Path, front: bytes, given: bytes) -> str:
    """Return a file's checksum; raise an OSError unless it is ``front``, and values with the checksum ``given``."""
    found, values, buffer = checksum.begin(), checksum.begin(), memoryview(bytearray(4 * BLOCK))
    found.update(front)
    with open(path, "rb", buffering=0) as file:
        whole = file.read(len(front)) == front
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            values.update(buffer[:count])
    if not whole or values.digest() != given:
        raise OSError(f"{path.name} does not hold what was written to it")
    return found.hexdigest()
