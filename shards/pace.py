"""When a stream will be at a position, by the time that its last batches took."""

import time
from collections import deque

_BATCHES = 1000  # a pause to evaluate or to save counts as part of the pace, one long ago does not


class Pace:
    """The clock of one stream; ``at`` from one thread."""

    def __init__(self) -> None:
        self._passed: deque[tuple[int, int]] = deque(maxlen=_BATCHES)  # (nanoseconds since 1970, position)
        self._started = False
        self._last = (time.time_ns(), 0)
        self._pace = 1e6  # nanoseconds a position; a guess, until two batches have passed

    def at(self, position: int) -> None:
        """Note that the stream is at a position, at or after the one noted last."""
        self._last = now, _ = time.time_ns(), position
        if self._started:  # what begins with a run, and its first batch waits for, is no part of the pace
            self._passed.append(self._last)
            then, first = self._passed[0]
            if position > first:
                self._pace = (now - then) / (position - first)
        self._started = True

    def jump(self) -> None:
        """Note that the next position may be anywhere."""
        self._passed.clear()
        self._started = False

    def moment(self, position: int) -> int:
        """Return when the stream will be at a position, nanoseconds since 1970."""
        now, last = self._last
        return now + int((position - last) * self._pace)
