"""Stopping on request: a signal sets a flag, and all ranks agree on it between two steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_asked = False


def listen() -> None:
    """Let SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C ask for a stop; the handler does nothing but note it."""
    for number in SIGNALS:
        signal.signal(number, _note)


def asked() -> bool:
    """Return whether this rank was asked to stop."""
    return _asked


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it
