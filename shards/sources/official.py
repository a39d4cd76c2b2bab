"""A folder as its authors give it out: what is common to those whose lists tell images, labels and parts."""

from pathlib import Path

from shards.errors import UserError
from shards.sources import Source
from shards.store import open_store


class Official(Source):
    """A folder whose images stay where they are.

    Args:
        root: The folder.
        unpacked: Not needed.
    """

    def __init__(self, root: str, unpacked: Path | None):
        self.root, self.others = root, {}
        self._store = open_store(root)

    def _bytes(self, name: str, remedy: str) -> bytes:
        """Return a whole file of the folder; a UserError with the remedy if there is none."""
        if not self._store.exists(name):
            raise UserError(f"{self.root} lacks {name}; {remedy}")
        return self._store.read(name)
