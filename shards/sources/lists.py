"""Images and a list of each part: the form in which VTAB-1k's tasks go round.

``SOURCE/train800.txt``, ``val200.txt`` and ``test.txt`` have a line an image: its path in the folder, and its class,
counted from 0. ``classes.txt``, a name a line, names the classes; without it they are numbers.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError
from shards.sources import Item, clean_key
from shards.sources.official import Official

UNION = "train800val200.txt"  # of the first two parts, which a mixture of them is as well
NAMES = "classes.txt"


class Lists(Official):
    """The images of a task of VTAB-1k, or of anything that is written down like one.

    Args:
        root: The task's folder.
        unpacked: Not needed.

    Raises:
        UserError: A list is missing, empty or not of this form, or names a class that is not there.
    """

    kind = "lists"
    mark = "train800.txt"
    parts = ("train800", "val200", "test")

    def __init__(self, root: str, unpacked: Path | None):
        super().__init__(root, unpacked)
        self._rows = {part: self._read(f"{part}.txt") for part in self.parts}
        files = self._store.list("")
        self.others = dict(Counter(name for name in files if name == UNION))
        most = max(label for rows in self._rows.values() for _, label in rows)
        if NAMES in files:
            self.classes = self._store.read(NAMES).decode("utf-8").split("\n")
            self.classes = [name.strip() for name in self.classes if name.strip()]
            if most >= len(self.classes):
                raise UserError(
                    f"the lists of {root} have a class {most}, and {NAMES} {len(self.classes)} names; mend it"
                )
        else:
            self.classes = [str(label).zfill(len(str(most))) for label in range(most + 1)]

    def items(self) -> Iterator[Item]:
        """Yield the images part by part, in the order of the lists."""
        for part, rows in self._rows.items():
            for path, label in rows:
                yield Item(clean_key(path), f"./{path}" if path.startswith("@/") else path, 0, -1, (label,), part=part)

    def _read(self, name: str) -> list[tuple[str, int]]:
        rows, every = [], ", ".join(f"{part}.txt" for part in self.parts)
        text = self._bytes(name, f"a task of VTAB-1k has {every}").decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            path, _, label = line.strip().rpartition(" ")
            if not line.strip():
                continue
            if not path or not label.isdecimal() or path.startswith("/") or ".." in path.split("/"):
                raise UserError(f"line {number} of {self.root}/{name} is {line!r}, not as images/0001.jpg 3; mend it")
            rows.append((path, int(label)))
        if not rows:
            raise UserError(f"{self.root}/{name} is empty: the part would have no images; get it again")
        return rows
