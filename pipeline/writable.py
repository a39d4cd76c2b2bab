"""Folders of results: that they can be written is seen before the work, and a full disk after it is told in a line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError


def make_writable(folder: Path) -> None:
    """Make a folder, if it is not there; a UserError where nothing can be written into it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a UserError of what goes wrong while files are written into a folder."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write into {folder}: {why}; give another folder, or make room") from error
