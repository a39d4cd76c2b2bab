"""Write safetensors files tensor by tensor, so that no model need be in memory.

The format: 8 bytes that say how long the header is, the header in JSON, spaces up to a multiple of 8, and the values.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ROOM = 1024
"""Bytes left in a header, so that what is noted there may still grow."""


def write(
    path: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], metadata: dict[str, str], room: int = 0
) -> None:
    """Write a file.

    Args:
        path: Of the file.
        like: What each tensor is like, on any device, meta among them.
        tensor: Gives each, once, in the order of their names.
        metadata: Goes into the header.
        room: Bytes by which ``metadata`` may still grow in ``change_metadata``.
    """
    header, at = {}, 0
    for name in sorted(like):
        size = like[name].numel() * like[name].element_size()
        entry = {"dtype": CODES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [at, at + size]}
        header[name], at = entry, at + size
    with open(path, "wb") as file:
        text = header_text(header, metadata)
        text = text.ljust(-(-(len(text) + room) // 8) * 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(like):
            value = tensor(name)
            if (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
                raise ValueError(f"{name} is {value.dtype} {value.shape}, not what its header says")
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)


def change_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Put other metadata into a file whose header has room for it."""
    with open(path, "rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        del header["__metadata__"]
        text = header_text(header, metadata)
        if len(text) > length:
            raise ValueError(f"{len(text)} bytes do not go into a header of {length}")
        file.seek(8)
        file.write(text.ljust(length))


def header_text(header: dict, metadata: dict[str, str]) -> bytes:
    """Return a header without its length: of each tensor ``dtype``, ``shape`` and ``data_offsets``, and metadata."""
    return json.dumps({"__metadata__": metadata} | header, separators=(",", ":")).encode()
