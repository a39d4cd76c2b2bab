"""Files of named tensors, of which one at a time is in memory: safetensors, what torch.save wrote, .npz archives.

Nothing is unpickled but tensors: torch's files are loaded with ``weights_only``, archives without pickle.
"""

import argparse
import json
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.mapped import Mapped
from shards.errors import UserError

NOTE = "patchmill"  # the key of our note in the metadata of our own files
EXPORT = "patchmill_export"  # and of those that are for others, and have their names
DENSEST = 1100  # bytes that one of a .npz can stand for, somewhat more than deflate can


@dataclass(frozen=True)
class Tensors:
    """Named tensors.

    Attributes:
        where: The file or folder, for messages.
        shapes: Of every tensor, by name.
        read: Gives one by name.
        row: Gives row ``i`` of one, without reading the others where the file allows that.
        note: What Patchmill noted in it.
    """

    where: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    row: Callable[[str, int], Tensor]
    note: dict[str, Any]


def of_safetensors(files: Iterable[Path], where: Path) -> Tensors:
    """Read a safetensors file, or several that are one model."""
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    note: dict[str, Any] = {}

    def opened(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable safetensors file ({error}); get or make it again") from None

    for path in files:
        file = opened(path)
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            found[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        metadata = file.metadata() or {}
        note |= json.loads(metadata.get(NOTE) or metadata.get(EXPORT, "{}"))
    mapped = Mapped(opened)

    def read(name: str) -> Tensor:
        return mapped.copied(mapped(found[name]).get_tensor(name))

    def row(name: str, i: int) -> Tensor:
        return mapped.copied(mapped(found[name]).get_slice(name)[i])

    return Tensors(where, shapes, read, row, note)


def load_torch(path: Path, harmless: Iterable[Any] = (argparse.Namespace,)) -> Any:
    """Load what torch.save wrote, on the CPU and mapped where its format allows it; nothing but tensors is unpickled.

    Args:
        path: The file.
        harmless: Classes that may be in it too, or (class, the name of another in whose place it is taken).

    Raises:
        UserError: There is something else in it, or it is no such file.
    """
    archive = zipfile.is_zipfile(path)
    try:
        # Of the old format it is read through a map of the file, which never gives more than there is.
        with torch.serialization.safe_globals(list(harmless)), nullcontext(path) if archive else _map(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise UserError(
            f"{path} holds more than tensors, and nothing else is unpickled ({what.strip()}); "
            "save the model's state_dict() alone, best as safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001, a damaged file makes torch raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({why}); get or make it again") from None


def _map(path: Path) -> Any:  # an mmap, which reads and seeks as torch.load asks of a file
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_plain(value: Any) -> bool:
    """Tell whether a value that was loaded is a dense tensor on the CPU, of no more values than its file has."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


INDEXES = (torch.bool, torch.int64, torch.int32, torch.uint8)
"""Kinds of numbers that masks and counters have, and no weights."""

# Where training programs put a model's state inside what they save, and where the average of its weights.
STATES = ("state_dict", "model", "module", "model_state_dict", "params")
AVERAGES = ("state_dict_ema", "model_ema", "ema")


def of_torch(files: Iterable[Path], where: Path, ema: bool = False) -> Tensors:
    """Read what torch.save wrote: a state, or a table with one in it, such as timm's checkpoints."""
    mapped = Mapped(lambda path: _state(load_torch(path), path, ema))
    found = {name: path for path in files for name in mapped(path)}
    shapes = {name: tuple(mapped(path)[name].shape) for name, path in found.items()}

    def read(name: str) -> Tensor:
        return mapped.copied(mapped(found[name])[name])

    return Tensors(where, shapes, read, lambda name, i: mapped.copied(mapped(found[name])[name][i]), {})


def _state(loaded: Any, path: Path, ema: bool) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no table of tensors; save a model's state_dict()")
    keys = AVERAGES if ema else STATES
    state = next((loaded[key] for key in keys if isinstance(loaded.get(key), dict)), None if ema else loaded)
    if state is None:
        raise UserError(f"{path} has no moving average of the weights; take the weights themselves")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"{path} holds no tensors under {', '.join(map(str, state))[:200]}; save a model's state_dict()"
        )
    plain = {name: value for name, value in tensors.items() if is_plain(value)}
    if odd := next((name for name in tensors.keys() - plain.keys() if tensors[name].dtype not in INDEXES), None):
        raise UserError(f"{path} holds {odd} as no plain tensor: it is sparse, quantized or has values several times")
    return plain


def _note(comment: bytes) -> dict[str, str]:
    """Return the note in an archive's comment; of what others wrote there, nothing."""
    try:
        note = json.loads(zlib.decompress(comment))
    except (zlib.error, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def of_npz(path: Path) -> Tensors:
    """Read a .npz archive, never with pickle. NumPy keeps bfloat16 as 2 bytes of void, which is known."""
    archive, most = zipfile.ZipFile(path), DENSEST * path.stat().st_size
    note = _note(archive.comment)
    members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
    headers = {}
    for name, member in members.items():
        with _reading(f"{name} of {path}"), archive.open(member) as stream:
            shape, _, dtype = headers[name] = _header(stream, f"{name} of {path}")
            size = math.prod(shape) * dtype.itemsize
            if stream.tell() + size != member.file_size or size > most:  # before there is memory for it
                raise ValueError(f"{member.file_size} bytes for an array of {size}")

    def read(name: str) -> Tensor:
        with _reading(f"{name} of {path}"), archive.open(members[name]) as stream:
            return _as_tensor(np.lib.format.read_array(stream, allow_pickle=False))

    def row(name: str, i: int) -> Tensor:
        shape, transposed, dtype = headers[name]
        member = members[name]
        if transposed or member.compress_type != zipfile.ZIP_STORED:
            return read(name)[i]
        count = int(np.prod(shape[1:], dtype=int))
        with _reading(f"{name} of {path}"), open(path, "rb") as file:  # the archive would read all that comes before
            file.seek(member.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
            _header(file, name)
            file.seek(i * count * dtype.itemsize, 1)
            return _as_tensor(np.fromfile(file, dtype, count).reshape(shape[1:]))

    return Tensors(path, {name: header[0] for name, header in headers.items()}, read, row, note)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Tell what fails while a member of an archive is read."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} cannot be read ({error}); get or make the file again") from None


def _header(stream: Any, what: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether it is in the order of columns, dtype) of a .npy file, which is left at its values."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, transposed, dtype = read(stream)
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {shape}")
    except (ValueError, KeyError, TypeError, SyntaxError, TokenError, OverflowError, RecursionError) as error:
        raise UserError(f"{what} is no NumPy array ({error}); get or make the file again") from None
    if dtype.hasobject:
        raise UserError(f"{what} is pickled, and nothing is unpickled; save arrays of numbers alone")
    return shape, transposed, dtype


def _as_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
