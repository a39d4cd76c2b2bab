"""Files that are mapped into memory to be read, and let go when enough was read of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

AT_ONCE = 2**28
"""Bytes to read of mapped files before they are let go: until then they count as this process's memory."""


class Mapped:
    """Loaded files, by path; what is read of them must be told by ``counted`` or ``copied``."""

    def __init__(self, load: Callable[[Path], Any]):
        self._load = load
        self.close()

    def __call__(self, path: Path) -> Any:
        """Return what ``load`` makes of the file."""
        if self._bytes > AT_ONCE:
            self.close()
        if path not in self._open:
            self._open[path] = self._load(path)
        return self._open[path]

    def counted(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a file, which is about to be copied."""
        self._bytes += tensor.nbytes
        return tensor

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a file in memory of its own."""
        return self.counted(tensor).clone()

    def close(self) -> None:
        """Let go of the files; another call loads them again."""
        self._open: dict[Path, Any] = {}
        self._bytes = 0
