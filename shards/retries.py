"""Asks a server again after a fault that may pass, with growing pauses, and counts how often.

``obstore`` would do so itself, but tell nobody, and not where a connection ends inside an answer.
"""

import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from obstore.exceptions import BaseError

Answer = TypeVar("Answer")

# A server's own trouble, or too many requests; no connection, or none that held; an answer that was cut short.
_PASSING = re.compile(r"status code: (5\d\d|429|408)|error sending request|response body")
_FIRST, _LONGEST = 0.1, 15.0  # seconds of a pause


class Retries:
    """Safe to share between threads.

    Args:
        seconds: For which a request is asked again, from its first fault on.

    Attributes:
        count: Requests that were asked again so far.
    """

    def __init__(self, seconds: float):
        self.count = 0
        self._seconds, self._lock = seconds, threading.Lock()

    def __call__(self, request: Callable[[], Answer]) -> Answer:
        """Return what ``request`` does; its error if that will not pass, or time is up before the next try."""
        deadline = None
        attempt = -1
        while True:
            attempt += 1
            try:
                return request()
            except BaseError as error:
                pause = min(_FIRST * 2**attempt, _LONGEST) * random.uniform(0.5, 1)  # not all workers at once
                deadline = deadline or time.monotonic() + self._seconds
                if not _PASSING.search(str(error).partition("\n")[0]) or time.monotonic() + pause > deadline:
                    raise
            with self._lock:
                self.count += 1
            time.sleep(pause)
