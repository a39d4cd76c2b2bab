"""A folder of images, one folder a class: ``SOURCE/CLASS/.../image.jpg``, on disk or in a bucket."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError
from shards.sources import Item
from shards.store import open_store

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Folder:
    """The images below ``root``: its first-level folders are the classes, hidden files are passed over.

    Raises:
        UserError: There is no such folder, or it has no class folders.
    """

    root: str
    unpacked: Path

    kind = "folder"
    multi_label = False
    classes: list[str] = field(init=False)
    others: dict[str, int] = field(init=False)

    def __post_init__(self):
        self._store = open_store(self.root)
        self.classes = [name for name in self._store.folders() if not name.startswith(".")]
        loose = [name for name in self._store.list("") if not name.startswith(".")]
        self._loose = Counter(map(_extension, loose))
        self.others = dict(self._loose)
        if not self.classes:
            count = sum(name.lower().endswith(EXTENSIONS) for name in loose)
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
            for path, size, changed in self._store.walk(name):
                if not path.lower().endswith(EXTENSIONS):
                    others[_extension(path)] += 1
                    continue
                if path.encode(errors="ignore").decode() != path:
                    raise UserError(f"the name of image {path!r} in {self.root} is not UTF-8; rename it")
                if size < 0:
                    raise UserError(f"cannot read {self.root}/{path}: it is a link to nowhere; mend or remove it")
                empty = False
                file = f"./{path}" if path.startswith("@/") else path  # "@/" means what was unpacked
                yield Item(os.path.splitext(path)[0].replace(".", "_"), file, 0, size, (label,), (), changed)
            if empty:
                raise UserError(
                    f"class folder {name} of {self.root} has no images ({' '.join(EXTENSIONS)}); "
                    "add some or remove the folder"
                )
        self.others = dict(sorted(others.items()))


class ImageFile(NamedTuple):
    """An image file as the scan found it."""

    key: str  # its path in the source without extension, dots as _; unique
    path: str  # relative to the source
    label: int
    size: int  # bytes
    changed: int  # nanoseconds since 1970


class Found(NamedTuple):
    """What a source holds: images sorted by key, and how many other files it has of each extension."""

    classes: list[str]
    images: list[ImageFile]
    others: dict[str, int]


def scan(source: Path) -> Found:
    """Find all images in ``source``: the first-level folders are the classes, hidden files are passed over.

    Raises:
        UserError: There is no such folder, it has no class folders, a class has no images, two images would
            get the same key, or something cannot be read.
    """
    if not source.is_dir():
        raise UserError(f"no folder {source}; give the folder that holds one folder of images for each class")
    others: Counter[str] = Counter()
    images = []
    try:
        folders = [entry for entry in _visible(source) if entry.is_dir()]
        loose = [entry.name for entry in _visible(source) if not entry.is_dir()]
        for label, folder in enumerate(folders):
            before = len(images)
            images.extend(_images(folder.path, str(source), label, others))
            if len(images) == before:
                raise UserError(
                    f"class folder {folder.name} of {source} has no images ({' '.join(EXTENSIONS)}); "
                    "add some or remove the folder"
                )
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; mend or remove it") from error
    if not folders:
        count = sum(name.lower().endswith(EXTENSIONS) for name in loose)
        what = f"has {count} images but no class folders" if count else "is empty"
        raise UserError(f"{source} {what}; put the images of each class into a folder: {source}/CLASS/name.jpg")
    others.update(map(_extension, loose))
    images.sort()
    for one, other in pairwise(images):
        if one.key == other.key:
            raise UserError(
                f"{one.path} and {other.path} in {source} have one key, {one.key} (the path without "
                "extension, dots as _); rename or remove one"
            )
    return Found([folder.name for folder in folders], images, dict(sorted(others.items())))


def _images(folder: str, source: str, label: int, others: Counter[str]) -> Iterator[ImageFile]:
    """Yield the images anywhere below ``folder``; count all other files in ``others``."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _images(entry.path, source, label, others)
        elif entry.name.lower().endswith(EXTENSIONS):
            status = entry.stat()
            path = entry.path[len(source) + 1 :]
            if path.encode(errors="ignore").decode() != path:
                raise UserError(f"the name of image {path!r} in {source} is not UTF-8; rename it")
            key = os.path.splitext(path)[0].replace(".", "_")
            yield ImageFile(key, path, label, status.st_size, status.st_ctime_ns)
        else:
            others[_extension(entry.name)] += 1


def _visible(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda each: each.name)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"
