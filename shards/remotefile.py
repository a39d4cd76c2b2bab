"""A remote object as a file."""

import io
import os
from collections.abc import Callable

STREAM_BYTES = 8 << 20  # a request of a sequential remote read: past the size where latency matters


def remote_file(size: int, read_range: Callable[[int, int], bytes]) -> io.BufferedReader:
    """Return an object of ``size`` bytes to read and seek in; ``read_range`` takes start and length."""
    return io.BufferedReader(range_file(size, read_range), STREAM_BYTES)


def range_file(size: int, read_range: Callable[[int, int], bytes]) -> io.RawIOBase:
    """Return the same without a buffer: each read is one of ``read_range``."""
    return _RangeFile(size, read_range)


class _RangeFile(io.RawIOBase):
    def __init__(self, size: int, read_range: Callable[[int, int], bytes]):
        self._size, self._read_range = size, read_range
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._read_range(self._at, length)
            self._at += length
        return length

    def readall(self) -> bytes:
        pieces = []
        while piece := self.read(STREAM_BYTES):
            pieces.append(piece)
        return b"".join(pieces)
