"""Where images come from: a file for each kind of source. All list what they hold; how bytes are read is one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from shards.tarscan import METADATA


class Item(NamedTuple):
    """One image that a source offers, and where its bytes are.

    ``file`` is relative to the source's root, or a URL, or ``@/...`` below the folder ``unpacked`` for images
    that cannot be read in place (rows of Parquet, CIFAR, members of compressed tars).
    """

    key: str  # unique in the source; the name in the tar: no dots, no ".." and no leading slash
    file: str
    offset: int  # of its first byte in the file
    size: int  # in bytes; -1: the whole file, however long it is
    labels: tuple[int, ...]
    weights: tuple[float, ...] = ()  # of the labels; empty: all are 1
    changed: int = 0  # when the file was, nanoseconds since 1970; 0: nobody knows
    part: str = ""  # such as train or test, where the source itself is divided
    broken: str = ""  # why the image cannot be used, if the source knows: it is rejected unread


class Source(Protocol):
    """What a kind of source gives the build; each kind is a class below this one.

    Attributes:
        kind: Its name, as in ``KINDS`` of open.py.
        root: Folder or URL that relative files count from.
        classes: Names; labels index into them.
        multi_label: True if an image may have no, several or weighted labels.
        others: How many other things were left out, by kind; complete once ``items`` has ended.
        mark: A file that no other kind has, by which a folder of this kind is known.
        parts: That have images, or something is wrong with the source.
        border: Pixels at each edge that are no part of an image, and not stored.
    """

    kind: str
    root: str
    classes: list[str]
    multi_label: bool = False
    others: dict[str, int]
    mark: str = ""
    parts: Sequence[str] = ()
    border: int = 0

    def items(self) -> Iterator[Item]:
        """Yield all images, in an order that depends on the source alone.

        Raises:
            UserError: Something about the source is wrong.
        """


def clean_key(path: str) -> str:
    """Return the key of an image by its path or name: no extension, no dots, no way out of a folder.

    ``../a b/c.d.jpg`` becomes ``__/a b/c_d``, ``__x__/a.jpg`` becomes ``_x__/a``. Two paths may get
    one key, which the build refuses.
    """
    folder, _, name = path.replace("\\", "/").rpartition("/")
    stem = name.rpartition(".")[0] or name
    parts = [part for part in [*folder.split("/"), stem] if part not in ("", ".")]
    return as_sample("/".join(part.replace(".", "_") for part in parts))


def as_sample(key: str) -> str:
    """Return a key that WebDataset's readers take for a sample: they skip a first folder ``__x__``, here ``_x__``."""
    while METADATA.match(f"{key}.jpg"):
        key = key[1:]
    return key


def unpacked_path(unpacked: Path, file: str) -> Path:
    """Return where a file ``@/...`` of an item lies."""
    return unpacked / file.removeprefix("@/")


def place(url: str) -> tuple[str, str]:
    """Return the folder or store that holds a file, and the file's name there."""
    if "://" in url:
        folder, _, name = url.rpartition("/")
        return folder, name
    path = Path(url)
    return str(path.parent), path.name
