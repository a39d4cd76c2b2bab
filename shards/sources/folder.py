"""A folder of images, one folder a class: ``SOURCE/CLASS/.../image.jpg``, on disk or in a bucket."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.sources import Item, Source, as_sample
from shards.store import open_store

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
PARTS = ("train", "val", "valid", "validation", "test")


@dataclass
class Folder(Source):
    """The images below ``root``: its first-level folders are the classes; other files, and hidden ones, are counted.

    Raises:
        UserError: There is no such folder, it has no class folders, or those of several parts.
    """

    root: str
    unpacked: Path

    kind = "folder"
    classes: list[str] = field(init=False)
    others: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._store = open_store(self.root)
        self.classes = [name for name in self._store.folders() if not name.startswith(".")]
        if self._store.local and (lost := [path.name for path in Path(self.root).iterdir() if not path.exists()]):
            raise UserError(
                f"cannot read {self.root}/{min(lost)}: it is a link to nowhere; mend or remove it (left out, it would "
                "change the numbers of the classes)"
            )
        loose = self._store.list("")
        if self.classes and all(name.lower() in PARTS for name in self.classes):
            raise UserError(
                f"{self.root} is divided into {' and '.join(self.classes)}, which are no classes; give one of them, as "
                f"in {self.root}/{self.classes[0]}"
            )
        self._loose = Counter(map(_kind, loose))
        self.others = dict(self._loose)
        if not self.classes:
            count = sum(name.lower().endswith(EXTENSIONS) and not _is_hidden(name) for name in loose)
            what = f"has {count} images but no class folders" if count else "is empty"
            raise UserError(
                f"{self.root} {what}; put the images of each class into a folder: {self.root}/CLASS/name.jpg"
            )

    def items(self) -> Iterator[Item]:
        """Yield the images, class by class, sorted folder by folder.

        Raises:
            UserError: A class has no images, a name is not UTF-8, or something cannot be read.
        """
        others = self._loose.copy()
        for label, name in enumerate(self.classes):
            empty = True
            for path, size, changed in self._store.walk(name, hidden=True):
                if _is_hidden(path) or not path.lower().endswith(EXTENSIONS):
                    others[_kind(path)] += 1
                    continue
                if path.encode(errors="ignore").decode() != path:
                    raise UserError(f"the name of image {path!r} in {self.root} is not UTF-8; rename it")
                if size < 0:
                    raise UserError(
                        f"cannot read {self.root}/{path}: it is a link to nowhere or no plain file; mend or remove it"
                    )
                empty = False
                file = f"./{path}" if path.startswith("@/") else path  # "@/" means what was unpacked
                key = as_sample(os.path.splitext(path)[0].replace(".", "_"))
                yield Item(key, file, 0, size, (label,), (), changed)
            if empty:
                raise UserError(
                    f"class folder {name} of {self.root} has no images ({' '.join(EXTENSIONS)}); "
                    "add some or remove the folder"
                )
        self.others = dict(sorted(others.items()))


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def _kind(path: str) -> str:
    """Return as what a file is counted that is left out."""
    return "hidden" if _is_hidden(path) else os.path.splitext(path)[1].lower() or "no extension"
