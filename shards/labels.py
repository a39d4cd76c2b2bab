"""What the members of a WebDataset sample say about its labels: ``KEY.cls``, ``KEY.json``, ``KEY.txt``."""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from shards.tarscan import Member

FIELDS = ("label", "labels", "cls")  # of a JSON object, the first that is there
LARGEST = 2**31 - 1  # labels are int32

MOST_WEIGHT = 3.4028234663852886e38  # the largest float32

_INTEGER = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,17}))(?:\.0+)?")  # not 007, but 7.0, as integers beside gaps become


class LabelError(ValueError):
    """A label that makes no sense; the message is the reason."""


class Found(NamedTuple):
    """Labels as they stand in the tar, class names or indices, and their weights; no weights: all are 1."""

    labels: list[int | str]
    weights: list[float]


@dataclass(frozen=True)
class LabelRule:
    """Where labels stand.

    Attributes:
        extension: Of the member. Empty: ``cls``, or else ``json``; never ``txt``, which is a caption mostly.
        field: Of a JSON object, with dots into objects inside it. Empty: the first of ``FIELDS``.
    """

    extension: str = ""
    field: str = ""

    @classmethod
    def parse(cls, text: str) -> "LabelRule":
        """Parse ``EXTENSION`` or ``EXTENSION:FIELD``, such as ``cls``, ``txt``, ``json:meta.label``, or nothing."""
        extension, _, field = text.strip().partition(":")
        return cls(extension.strip().removeprefix(".").lower(), field.strip())

    def __str__(self) -> str:
        return f"{self.extension}:{self.field}" if self.field else self.extension

    def wants(self, extension: str) -> bool:
        """Tell whether labels may stand in a member of that extension."""
        return extension == self.extension if self.extension else extension in ("cls", "json")

    def find(self, members: list[Member]) -> Found:
        """Return the labels of a sample; none if nothing is said.

        Args:
            members: With the data of those that ``wants`` names.

        Raises:
            LabelError: What stands there is no label.
        """
        mine = sorted((member for member in members if self.wants(member.extension)), key=lambda each: each.extension)
        for one, other in pairwise(mine):
            if one.extension == other.extension:
                raise LabelError(f"two members .{one.extension}")
        for member in mine:
            found = self._read(member)
            if found.labels:
                return found
        return Found([], [])

    def _read(self, member: Member) -> Found:
        try:
            text = (member.data or b"").decode("utf-8-sig").strip()
            if member.extension.rpartition(".")[2] in ("json", "jsn") or text.startswith("["):
                value = json.loads(text)
            else:
                return Found(_labels(text), [])
        except (ValueError, RecursionError) as error:
            raise LabelError(f".{member.extension} cannot be read: {error}") from error
        weights = None
        if isinstance(value, dict):
            weights = value.get("weights")
            value = _field(value, self.field)
        elif self.field:
            value = None
        labels = _labels(value)
        if len(set(labels)) < len(labels):
            raise LabelError(f".{member.extension} has a label twice (a list of indices or names is meant, no vector)")
        return Found(labels, _weights(weights, labels) if isinstance(weights, list) and isinstance(value, list) else [])


def _field(value: Any, field: str) -> object:
    if not field:
        return next((value[name] for name in FIELDS if name in value), None)
    if field in value:
        return value[field]
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _labels(value: object) -> list[int | str]:
    """Return labels; a negative index and an empty name mean that there is none."""
    if value is None:
        return []
    if isinstance(value, list):
        return [label for each in value for label in _one(each)]
    if isinstance(value, float) and value.is_integer():  # a list of such is rather a vector
        value = int(value)
    return _one(value)


def _one(value: object) -> list[int | str]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value] if value >= 0 else []
    if isinstance(value, str):
        value = value.strip()
        return [value] if value and (spelled(value) or 0) >= 0 else []
    raise LabelError(f"{str(value)[:50]!r} is neither an index nor a class name")


def _weights(weights: list, labels: list) -> list[float]:
    if len(weights) != len(labels):
        raise LabelError(f"{len(weights)} weights for {len(labels)} labels")
    for each in weights:
        if not is_weight(each):
            raise LabelError(f"weight {str(each)[:50]}: a weight is a number from 0 on that a float32 can hold")
    return [float(each) for each in weights]


def is_weight(value: object) -> bool:
    """Tell whether a value is a weight that a float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_WEIGHT


def spelled(text: str) -> int | None:
    """Return the integer that a text spells; None of a name. One with a leading zero, such as 007, is a name."""
    found = _INTEGER.fullmatch(text)
    return int(found[1]) if found else None


def as_index(label: int | str) -> int | None:
    """Return the class index that a label is or spells; None if it is a name.

    Raises:
        LabelError: It is too large for a class index.
    """
    index = spelled(label) if isinstance(label, str) else label
    if index is not None and index > LARGEST:
        raise LabelError(f"label {index} is too large for a class index")
    return index


class ClassNames:
    """The names of all classes, to look labels up in: a name, or else an index."""

    def __init__(self, names: list[str]):
        self.names = names
        self._index: dict[str, int] = {}
        self._twice = set()
        for index, name in enumerate(names):
            if self._index.setdefault(name, index) != index:
                self._twice.add(name)

    def index(self, label: int | str) -> int:
        """Return the class index of a label.

        Raises:
            LabelError: There is no such class, or two.
        """
        if label in self._twice:
            raise LabelError(f"two classes are called {label!r}")
        if label in self._index:
            return self._index[label]
        index = as_index(label)
        if index is None:
            raise LabelError(f"there is no class {label!r}")
        if index >= len(self.names):
            raise LabelError(f"label {index} is beyond the {len(self.names)} classes")
        return index
