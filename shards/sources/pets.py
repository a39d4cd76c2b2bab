"""The Oxford-IIIT Pet data set as its archives unpack (``images/``, ``annotations/``), in the parts train and test."""

import re
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError
from shards.sources import Item
from shards.sources.official import Official

LISTS = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
_LINE = re.compile(r"(\S+)_\d+ (\d+) [12] \d+")  # an image: name, class from 1, species, breed


class Pets(Official):
    """The pets: 37 breeds, 3,680 images to train (its ``trainval``) and 3,669 to test.

    Args:
        root: Folder that has ``images`` and ``annotations``.
        unpacked: Not needed.

    Raises:
        UserError: A list is missing, or is none of these.
    """

    kind = "pets"
    mark = LISTS["train"]
    parts = tuple(LISTS)

    def __init__(self, root: str, unpacked: Path | None):
        super().__init__(root, unpacked)
        self._rows = {part: list(self._read(path)) for part, path in LISTS.items()}
        named = {(label, breed) for rows in self._rows.values() for _, breed, label in rows}
        if [label for label, _ in sorted(named)] != list(range(len(named))):
            raise UserError(
                f"the lists of {root} give one class several names, or leave some out; get annotations.tar.gz again"
            )
        self.classes = [breed for _, breed in sorted(named)]

    def items(self) -> Iterator[Item]:
        """Yield the images to train, then those to test, in the order of the lists."""
        for part, rows in self._rows.items():
            for name, _, label in rows:
                yield Item(name.replace(".", "_"), f"images/{name}.jpg", 0, -1, (label,), part=part)

    def _read(self, path: str) -> Iterator[tuple[str, str, int]]:
        text = self._bytes(path, "unpack images.tar.gz and annotations.tar.gz there").decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            if line.startswith("#") or not line.strip():
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                raise UserError(
                    f"line {number} of {self.root}/{path} is {line!r}, not as Abyssinian_1 1 1 1; "
                    "get annotations.tar.gz again"
                )
            yield line.split()[0], found[1], int(found[2]) - 1
