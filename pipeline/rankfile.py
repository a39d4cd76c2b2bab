"""A rank's file of a checkpoint: written, flushed and read back."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.engines.fragments import Piece
from shards.atomic import fsync_folder

READ_BACK = 2**24
"""Bytes of a file just written that are compared with memory at once."""


def write_rank_file(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write a rank's pieces, flush them, and see that the file has what memory has.

    Args:
        path: Of the file.
        pieces: Float32, on any device.

    Returns:
        ``name``, ``bytes`` and ``sha256``.

    Raises:
        OSError: It cannot be written, or does not hold what was written.
    """
    tensors = {f"{kind}/{name}@{start}": tensor.cpu().contiguous() for kind, name, start, tensor in pieces}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as beside:
        flushed = beside.submit(_flush, path)
        digest = _read_back(path, tensors)
        flushed.result()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _read_back(path: Path, tensors: dict[str, Tensor]) -> str:
    """Return a file's SHA-256; raise an OSError unless its values are those of ``tensors``, bit for bit."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(length := file.read(8))
        digest.update(header := file.read(int.from_bytes(length, "little")))
        places = {name: place["data_offsets"] for name, place in json.loads(header).items() if name in tensors}
        for name in sorted(tensors, key=lambda each: places[each]):
            values = tensors[name].numpy().reshape(-1).view(np.uint8)
            for at in range(0, len(values), READ_BACK):
                expected = values[at : at + READ_BACK]
                digest.update(found := file.read(len(expected)))
                if not np.array_equal(np.frombuffer(found, np.uint8), expected):
                    raise OSError(f"{path.name} does not hold what was written to it")
    return digest.hexdigest()
