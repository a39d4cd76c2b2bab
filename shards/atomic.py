"""Files and folders that appear under their name whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it is flushed and renamed, else removed.

    The temporary name starts with a dot and ends in ``.partial``, so readers and globs pass it over. It is
    the same for every try: what a killed process left behind is overwritten by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_folder(path: str | Path) -> Path:
    """Return an empty temporary folder beside ``path``, to be filled and handed to ``commit_folder``."""
    path = Path(path)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit_folder(partial: Path, path: str | Path) -> None:
    """Rename a folder whose files are already flushed to its final name, replacing an older one."""
    path = Path(path)
    fsync_folder(partial)
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)
    fsync_folder(path.parent)
