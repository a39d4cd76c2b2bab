"""What a rank writes to its log, on the terminal of who started it."""

import sys
from pathlib import Path


class Tail:
    """What is written to a file from now on, on stderr.

    Args:
        path: The file; it may not be there yet.
        loud: Else nothing is shown.
    """

    def __init__(self, path: Path, loud: bool):
        self._path, self.loud = path, loud
        self._from = path.stat().st_size if path.exists() else 0

    def __enter__(self) -> "Tail":
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """End with what is left."""
        self.show()

    def show(self) -> None:
        """Show what is new."""
        if self.loud and self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._from)
                new = file.read()
            self._from += len(new)
            sys.stderr.write(new.decode(errors="replace"))
            sys.stderr.flush()
