"""Tables of float32 in files that all ranks write, each its own rows, and then all read: larger than memory."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline import distributed
from shards.errors import UserError


class RowFiles:
    """Files of a folder, to be written; made by all ranks together.

    A rank writes with nothing mapped, and reads nothing before all have written: on a network file system two machines
    that change one page in their memory would undo each other's part of it, or keep what it was before.

    Args:
        folder: On a disk that the ranks share; rank 0 makes it.
        rows: Of each table.
        sizes: Values a row, by the name of the table.

    Raises:
        UserError: The disk has no room for them, or a rank does not see the folder.
    """

    def __init__(self, folder: Path, rows: int, sizes: dict[str, int]):
        self._folder, self._rows, self._sizes = folder, rows, sizes
        distributed.raise_together(self._make() if distributed.rank() == 0 else None)
        self._files: dict[str, BinaryIO] = {}
        self._open = ExitStack()
        distributed.raise_together(self._open_all())

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write float32 [n, size] at the rows ``first`` to ``first + n - 1`` of a table."""
        file = self._files[name]
        file.seek(first * self._sizes[name] * 4)
        file.write(np.ascontiguousarray(values, np.float32).data)

    def tables(self) -> dict[str, np.ndarray]:
        """Return the tables, float32 [rows, size], in the files; collective, when all have written."""
        self._open.close()
        distributed.everyone(None)
        return {
            name: np.memmap(self._folder / name, np.float32, "r", shape=(self._rows, size))
            for name, size in self._sizes.items()
        }

    def _make(self) -> UserError | None:
        try:
            self._folder.mkdir()
            for name, size in self._sizes.items():
                with open(self._folder / name, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._rows * size * 4)
                    os.fsync(file.fileno())
                    # Where there is no such call, zeros were written: they are not to be written again over others'.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            wanted = self._rows * sum(self._sizes.values()) * 4 / 1e9
            return UserError(
                f"{' and '.join(self._sizes)} of {self._rows:,} images take {wanted:.3g} GB, which do not go into "
                f"{self._folder.parent} ({error.strerror}); make room, or set TMPDIR to a folder on another disk"
            )
        return None

    def _open_all(self) -> UserError | None:
        try:
            for name in self._sizes:
                file = os.fdopen(os.open(self._folder / name, os.O_WRONLY), "wb")
                self._files[name] = self._open.enter_context(file)
        except OSError as error:
            return UserError(
                f"rank {distributed.rank()} on {socket.gethostname()} cannot open {self._folder / name}, which rank 0 "
                f"has made ({error.strerror}); set TMPDIR to a folder that all ranks share"
            )
        return None
