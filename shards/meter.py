"""What a loader counts while it works: sums over its threads, cheap enough to be always on."""

import threading
from typing import NamedTuple


class Counts(NamedTuple):
    """Sums since a loader was made, of one rank.

    Attributes:
        bytes: Of the encoded images that came to its decode threads.
        read_seconds: That these threads waited for them.
        decode_seconds: That these threads decoded and transformed; by the clock, so a busy machine lengthens it.
        replaced: Samples that a stand-in replaced.
        quarantined: Different samples that did not decode.
        retries: Reads that a store was asked for again.
        cache_hits: Chunks that the cache had.
        cache_misses: Chunks that it was asked for and had not.
    """

    bytes: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    replaced: int = 0
    quarantined: int = 0
    retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


class Meter:
    """Sums that any thread may add to, a few samples at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes, self._read, self._decode = 0, 0.0, 0.0

    def add(self, bytes: int, read_seconds: float, decode_seconds: float) -> None:
        """Count some samples; see ``Counts``."""
        with self._lock:
            self._bytes += bytes
            self._read += read_seconds
            self._decode += decode_seconds

    def counts(self, **others: int) -> Counts:
        """Return the sums, with what somebody else counted."""
        with self._lock:
            return Counts(self._bytes, self._read, self._decode, **others)
