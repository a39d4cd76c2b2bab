"""Stopping on request: a signal sets a flag, and all ranks agree on it between two steps."""

import signal
from types import FrameType

_asked = False


def listen() -> None:
    """Let SIGTERM, SIGUSR1 and SIGUSR2 ask for a stop; the handler does nothing but note it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _note)


def asked() -> bool:
    """Return whether this rank was asked to stop."""
    return _asked


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
