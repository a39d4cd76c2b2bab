"""What ``checkpoint.json`` says, wherever it was read: nothing in it is believed before it has the right form."""

import json
import re
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from pipeline import checksum
from shards.errors import PatchmillError, UserError

FORMAT_VERSION = 3
CHECKSUM = "xxh3_128"  # of everything else in the index, from format 3 on


class BrokenCheckpointError(PatchmillError):
    """A checkpoint whose files are missing, cut short, altered or cannot be read."""


class Index(NamedTuple):
    """Of one checkpoint.

    Attributes:
        format_version: Of its layout.
        samples: Samples consumed when it was written.
        world_size: Number of ranks that wrote it.
        files: ``name``, ``bytes`` and checksum of each, under the checksum's name.
        shapes: Full shape of every parameter, by name.
        state: The run state given to ``checkpoint.save``.
    """

    format_version: int
    samples: int
    world_size: int
    files: list[dict[str, Any]]
    shapes: dict[str, tuple]
    state: dict[str, Any]


def index_text(index: dict[str, Any]) -> str:
    """Return the text of an index, with its checksum."""
    return json.dumps({**index, CHECKSUM: _checksum(json.loads(json.dumps(index)))}, indent=1)


def read_index(text: str | bytes, where: object) -> Index:
    """Return what an index says.

    Args:
        text: Of the index.
        where: The checkpoint, for errors.

    Raises:
        BrokenCheckpointError: It is damaged.
        UserError: A newer Patchmill wrote it.
    """
    try:
        told = json.loads(text)
        version = _be(int, told["format_version"])
        if version > FORMAT_VERSION:
            raise UserError(
                f"{where} was written by a newer Patchmill (format {version}, this one reads "
                f"{FORMAT_VERSION}); update Patchmill"
            )
        if version >= 3 and told.pop(CHECKSUM) != _checksum(told):
            raise ValueError("it does not have the checksum it was written with")
        shapes = {name: tuple(_count(each) for each in shape) for name, shape in told["shapes"].items()}
        numbers = _be(int, told["samples"]), _be(int, told["world_size"])
        return Index(version, *numbers, [_file(each) for each in told["files"]], shapes, _be(dict, told["state"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(
            f"{where} has no readable checkpoint.json: {error}; use another checkpoint"
        ) from None


def _checksum(told: dict[str, Any]) -> str:
    return xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())


def _file(told: dict[str, Any]) -> dict[str, Any]:
    name = _be(str, told["name"])
    if not re.fullmatch(r"rank-\d{5,}\.safetensors", name):  # it might lie, or be written to, anywhere
        raise ValueError(f"it names a file {name!r}")
    kind = checksum.kind(told)
    return {"name": name, "bytes": _be(int, told["bytes"]), kind: _be(str, told[kind])}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _be(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
